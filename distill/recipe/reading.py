"""YAML to a recipe, and every fault in it to one line.

Unknown keys are errors that name the nearest match. Values that YAML hands over as strings (`4e-5`) are coerced. A file
may name one parent (`extends: other.yaml`, relative to itself): mappings merge (but for one whose `backend` or `kind`
differs), everything else replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distill.errors import RecipeError, nearest
from distill.recipe.students import StudentConfig
from distill.recipe.whole import Recipe

M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override (`a.b=value`, value parsed as YAML) and validate a recipe. Raises RecipeError."""
    return load_settings(Recipe, path, overrides)


def load_settings(model: type[M], path: Path, overrides: Iterable[str] = ()) -> M:
    """The same for settings of any kind, `model`'s."""
    tree = _read_tree(path)
    for text in overrides:
        apply_override(tree, text)
    return parse(model, tree, where=path)


def load_student(path: Path, sft_overrides: Mapping[str, Any] | None = None) -> StudentConfig:
    """Read one student file of the zoo, with `sft_overrides` laid over its `sft` settings. Raises RecipeError."""
    tree = _read_tree(path)
    if sft_overrides:
        tree = _merge(tree, {"sft": dict(sft_overrides)})
    return parse(StudentConfig, tree, where=path)


def parse(model: type[M], tree: Any, *, where: Path | str) -> M:
    """Validate `tree` as `model`; the first fault becomes a RecipeError with file, dotted field and what is allowed."""
    try:
        return model.model_validate(tree)
    except ValidationError as exc:
        raise _recipe_error(exc, model, where) from exc


class _UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that is given twice is a fault: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve() if seen else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot be read ({getattr(exc, 'strerror', None) or exc})", where=path) from exc
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as exc:
        raise RecipeError(f"not valid YAML: {exc}", where=path) from exc
    if not isinstance(tree, dict):
        raise RecipeError(f"must be a mapping, got {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise RecipeError(f"must be a path, got {parent!r}", where=path, field="extends")
    parent_path = (path.parent / parent).resolve()
    if parent_path in (*seen, path.resolve()):
        raise RecipeError(f"{parent!r} extends this file again", where=path, field="extends")
    return _merge(_read_tree(parent_path, (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both and _same_kind(result[key], value) else value
    return result


def _same_kind(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Tell whether both describe the same thing: a teacher of another backend shares no settings with its parent's."""
    return all(tag not in above or above[tag] == below.get(tag) for tag in ("backend", "kind"))


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Lay `a.b=value` over a recipe that is not validated yet; the value is read as YAML. Raises RecipeError."""
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"must be a.b=value, got {text!r}", where="--set")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as exc:
        raise RecipeError(f"{raw!r} is not valid YAML", where="--set", field=dotted) from exc
    *parents, last = dotted.split(".")
    node: Any = tree
    for name in parents:
        node = _step(node, name, dotted, create=True)
    if isinstance(node, list):
        _step(node, last, dotted, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError("goes through a plain value", where="--set", field=dotted)


def _step(node: Any, name: str, dotted: str, *, create: bool) -> Any:
    if isinstance(node, dict):
        return node.setdefault(name, {}) if create else node[name]
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise RecipeError(f"index {name!r} is not in 0..{len(node) - 1}", where="--set", field=dotted)
        return node[int(name)]
    raise RecipeError("goes through a plain value", where="--set", field=dotted)


def _recipe_error(exc: ValidationError, model: type[BaseModel], where: Path | str) -> RecipeError:
    fault = exc.errors()[0]
    loc = [str(part) for part in fault["loc"]]
    message, got = fault["msg"], fault.get("input")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {nearest(loc[-1], _keys_beside(model, fault['loc']))}"
    elif fault["type"] == "missing":
        message = "required, but not given"
    elif fault["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    elif not isinstance(got, (dict, list)):
        message = f"{message}, got {got!r}"
    return RecipeError(message, where=where, field=".".join(loc))


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
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
        else:
            node = node.get("properties", {}).get(part, {})
            if "allOf" in node:
                node = node["allOf"][0]
            for option in node.get("anyOf", ()):
                if "$ref" in option or "discriminator" in option:
                    node = option
    return set(resolve(node).get("properties", {}))
