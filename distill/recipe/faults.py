"""Faults in settings, each as one line in plain words: the field, what it must be, what was got.

Pydantic refuses a value, and `fault_of` says so in the words of who wrote the file (`WORDS`). Or it takes the value for
one of another kind, as true for 1 and 0 for false: `misread` finds that. Numbers written as text stay numbers, because
YAML 1.1 reads `4e-5` as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from distill.errors import RecipeError, nearest

Location = tuple[int | str, ...]
SHOWN_CHARACTERS = 80
WHOLE_NUMBER_BITS = 63  # beyond it neither Parquet nor SQLite nor torch takes one
TOO_LARGE = "is too large a number"

# What each kind of pydantic's errors says, from its context. The field and what was got are added.
WORDS: dict[str, str | Callable[[Mapping[str, Any]], str]] = {
    "missing": "required, but not given",
    "union_tag_not_found": "{discriminator} is required, but not given",
    "value_error": lambda context: str(context["error"]),
    "invalid_key": "every key must be text",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
    "literal_error": "must be {expected}",
    **dict.fromkeys(("string_type", "string_unicode"), "must be text"),
    "string_pattern_mismatch": "must be of the form {pattern}",
    "string_too_short": lambda context: _least(context["min_length"], "characters"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number, written in digits"),
    "int_parsing_size": TOO_LARGE,
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    "too_short": lambda context: _least(context["min_length"], "entries"),
    "too_long": "must have at most {max_length} entries",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a mapping"),
}
TAKEN_AS = {("a number", "text"), ("text", "a date")}  # how YAML 1.1 reads `4e-5`, and 2024-08-01
# The error says all: what was got would say nothing, or is not there.
WITHOUT_VALUE = {
    "missing",
    "union_tag_not_found",
    "value_error",
    "extra_forbidden",
    "invalid_key",
    "too_short",
    "string_too_short",
}


def fault_of(exc: ValidationError, model: type[BaseModel], tree: Any, where: Path | str) -> RecipeError:
    """The first fault of `tree`. Of a union whose members all refuse, the one that got furthest into the value."""
    placed = [(_path(error["loc"], tree, error["type"]), error) for error in exc.errors(include_url=False)]
    first, _ = placed[0]
    beneath = [(path, error) for path, error in placed if path[: len(first)] == first]
    field, error = max(beneath, key=lambda one: len(one[0]))
    words, *others = dict.fromkeys(_words(error, model) for path, error in beneath if path == field)
    message = " or ".join([words, *(other.removeprefix("must be ") for other in others)])
    if error["type"] not in WITHOUT_VALUE:
        message += f", got {in_words(error.get('ctx', {}).get('tag', error['input']))}"
    return RecipeError(message, where=where, field=".".join(map(str, field)))


def misread(given: Any, taken: Any, at: Location = ()) -> Iterator[tuple[str, str]]:
    """Yield field and message of every value that was taken for another kind than it is, to make `taken` of `given`.

    And of whole numbers that nothing later could hold.
    """
    if isinstance(given, BaseModel):
        return  # somebody made it of values of the right kind
    if isinstance(taken, BaseModel):
        taken = {name: getattr(taken, name) for name in type(taken).model_fields}
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for key, value in given.items():
            if key in taken:
                yield from misread(value, taken[key], (*at, key))
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for number, (value, made) in enumerate(zip(given, taken, strict=False)):
            yield from misread(value, made, (*at, number))
    elif (kind := _kind(taken)) != _kind(given) and (kind, _kind(given)) not in TAKEN_AS:
        yield ".".join(map(str, at)), f"must be {kind}, got {in_words(given)}"
    elif isinstance(taken, int) and taken.bit_length() > WHOLE_NUMBER_BITS:
        yield ".".join(map(str, at)), TOO_LARGE


def in_words(value: Any) -> str:
    """A value as a recipe's author wrote it, cut where it is long; of what has parts, only what it is."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if not isinstance(value, str | int | float):
        return _kind(value)
    if isinstance(value, int) and value.bit_length() > WHOLE_NUMBER_BITS:
        return "a very large one"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _kind(value: Any) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "true or false"),
        (str, "text"),
        (int | float, "a number"),
        (Mapping, "a mapping"),
        (list | tuple, "a list"),
    )
    return next((name for of, name in kinds if isinstance(value, of)), f"a {type(value).__name__}")


def _least(length: int, parts: str) -> str:
    return "must not be empty" if length == 1 else f"must have at least {length} {parts}"


def _words(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key; {nearest(str(error['loc'][-1]), _keys_beside(model, error['loc']))}"
    if error["loc"][-1:] == ("[key]",):
        return "every key must be text"
    words = WORDS.get(error["type"], error["msg"])
    context = error.get("ctx", {})
    return words.format(**context) if isinstance(words, str) else words(context)


def _path(location: Location, tree: Any, kind: str) -> Location:
    """The place in the file: pydantic also names the member of a union that it tried, which nobody wrote there."""
    path: list[int | str] = []
    node = tree
    for part in location:
        if _is_in(part, node):
            node = node[part]
            path.append(part)
        elif kind == "missing" and part == location[-1]:
            path.append(part)
    return tuple(path)


def _is_in(part: int | str, node: Any) -> bool:
    if isinstance(node, list | tuple):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, Mapping) and part in node


def _keys_beside(model: type[BaseModel], loc: Location) -> set[str]:
    """The allowed keys at the place of an unknown one: walk the JSON schema, taking a union's member by its tag."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[1]]
        return node

    node = schema
    for part in loc[:-1]:
        node = resolve(node)
        mapping = node.get("discriminator", {}).get("mapping", {})
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in mapping:
            node = {"$ref": mapping[part]}
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        # Else it is a name that pydantic gives the member of a union.
        if "allOf" in node:
            node = node["allOf"][0]
        for option in node.get("anyOf", ()):
            if "$ref" in option or "discriminator" in option:
                node = option
    return set(resolve(node).get("properties", {}))
