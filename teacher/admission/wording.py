"""A request that is not valid, in the words and codes of OpenAI's API instead of those of its validator."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from teacher.admission.refusals import Refused

MAX_SHOWN = 60
JSON_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    list: "an array",
    dict: "an object",
    type(None): "null",
}
# What a field should have been, by the beginning of the validator's code.
EXPECTED = {
    "string": "a string",
    "int": "an integer",
    "float": "a decimal",
    "bool": "a boolean",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
}
TYPE_FAULT = re.compile(rf"({'|'.join(EXPECTED)})(_type|_parsing|_from_float|_attributes_type|_parsing_size)")
# How our own validators name the field that they speak of.
OWN_FIELD = re.compile(r"([\w.\[\]]+): (.*)", re.DOTALL)
BOUNDS = {
    "greater_than": ("below minimum value", "> {gt}", "below_min_value"),
    "greater_than_equal": ("below minimum value", ">= {ge}", "below_min_value"),
    "less_than": ("above maximum value", "< {lt}", "above_max_value"),
    "less_than_equal": ("above maximum value", "<= {le}", "above_max_value"),
}


def refusal_of(fault: ValidationError, form: type[BaseModel]) -> Refused:
    """The 400 for the first thing that is wrong with a body that should have been a `form`."""
    error = fault.errors(include_url=False)[0]
    param = _path(error["loc"])
    kind = error["type"]
    told = _TOLD.get(kind) or (_mistyped if TYPE_FAULT.fullmatch(kind) else _own_words)
    message, code = told(param, error)
    if kind == "value_error" and (named := OWN_FIELD.fullmatch(str(error["ctx"]["error"]))):
        param = f"{param}.{named[1]}" if param else named[1]
        message = f"Invalid {_quoted(param)}: {named[2]}."
    if kind == "extra_forbidden" and len(error["loc"]) == 1:
        return unknown_parameter(param, form.model_fields)
    return Refused(400, message, param=param or None, code=code)


def unknown_parameter(name: str, known: Iterable[str]) -> Refused:
    """The 400 for a field that is not among `known`."""
    near = difflib.get_close_matches(name, known, n=1)
    message = f"Unknown parameter: '{name}'." + (f" Did you mean '{near[0]}'?" if near else "")
    return Refused(400, message, param=name, code="unknown_parameter")


def _path(loc: Iterable[int | str]) -> str:
    """`messages[0].content`: without the tags of unions and of keys, which stand in brackets."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("(", "[")):
            path += f".{part}" if path else part
    return path


def _missing(param: str, error: ErrorDetails) -> tuple[str, str]:
    return f"Missing required parameter: {_quoted(param)}.", "missing_required_parameter"


def _unknown(param: str, error: ErrorDetails) -> tuple[str, str]:
    return f"Unknown parameter: {_quoted(param)}.", "unknown_parameter"


def _unsupported(param: str, error: ErrorDetails) -> tuple[str, str]:
    return f"Unsupported parameter: {_quoted(param)} is not supported with this model.", "unsupported_parameter"


def _not_among(param: str, error: ErrorDetails) -> tuple[str, str]:
    got, allowed = _shown(error["input"]), error["ctx"]["expected"]
    return f"Invalid value for {_quoted(param)}: {got}. Supported values are: {allowed}.", "invalid_value"


def _mistyped(param: str, error: ErrorDetails) -> tuple[str, str]:
    match = TYPE_FAULT.fullmatch(error["type"])
    expected = EXPECTED[match[1]] if match else "another type"
    got = JSON_NAMES.get(type(error["input"]), "something else")
    if got == expected or error["type"].endswith(("_parsing", "_from_float", "_parsing_size")):
        got = _shown(error["input"])
    return f"Invalid type for {_quoted(param)}: expected {expected}, but got {got} instead.", "invalid_type"


def _out_of_bounds(param: str, error: ErrorDetails) -> tuple[str, str]:
    where, allowed, code = BOUNDS[error["type"]]
    number = "decimal" if isinstance(error["input"], float) else "integer"
    bound = allowed.format(**{name: _plain(value) for name, value in error["ctx"].items()})
    got = _shown(error["input"])
    return (
        f"Invalid {_quoted(param)}: {number} {where}. Expected a value {bound}, but got {got} instead.",
        f"{number}_{code}",
    )


def _wrong_length(param: str, error: ErrorDetails) -> tuple[str, str]:
    context, kind = error.get("ctx", {}), error["type"]
    thing = "string" if kind.startswith("string") else "object" if isinstance(error["input"], dict) else "array"
    article = "an" if thing[0] in "ao" else "a"
    if kind.endswith("too_short"):
        message = f"{thing} too short. Expected {article} {thing} with minimum length {context['min_length']}"
        got = f"an empty {thing}" if not error["input"] else f"one with length {len(error['input'])}"
        return f"Invalid {_quoted(param)}: {message}, but got {got} instead.", f"empty_{thing}"
    message = f"{thing} too long. Expected {article} {thing} with maximum length {context['max_length']}"
    got = f"{article} {thing} with length {len(error['input'])}"
    return f"Invalid {_quoted(param)}: {message}, but got {got} instead.", f"{thing}_above_max_length"


def _own_words(param: str, error: ErrorDetails) -> tuple[str, str]:
    """What a validator of ours says, or pydantic's own words where the API has none."""
    said = error["ctx"]["error"] if error["type"] == "value_error" else error["msg"][:1].lower() + error["msg"][1:]
    return f"Invalid {_quoted(param)}: {said}.", "invalid_value"


_TOLD: dict[str, Callable[[str, ErrorDetails], tuple[str, str]]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "none_required": _unsupported,
    "literal_error": _not_among,
    **dict.fromkeys(BOUNDS, _out_of_bounds),
    **dict.fromkeys(("too_long", "too_short", "string_too_long", "string_too_short"), _wrong_length),
}


def _quoted(param: str) -> str:
    return f"'{param}'" if param else "body"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
