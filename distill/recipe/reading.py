"""YAML to a recipe, and every fault in it to one line.

Unknown keys are errors that name the nearest match. Numbers that YAML hands over as strings (`4e-5`) are coerced. A
file may name one parent (`extends: other.yaml`, relative to itself): mappings merge (but for one whose `backend` or
`kind` differs), everything else replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from distill.errors import RecipeError
from distill.reading.yaml_text import parse_yaml, read_yaml
from distill.recipe.faults import fault_of, misread
from distill.recipe.results import names_and_problems
from distill.recipe.students import StudentConfig
from distill.recipe.whole import Recipe

M = TypeVar("M", bound=BaseModel)
MAX_PARENTS = 16


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
    if model is Recipe and isinstance(tree, dict) and "eval" in tree:
        with suppress(ValueError):  # which validation words better
            tree = {**tree, "eval": names_and_problems(tree["eval"])}
    try:
        settings = model.model_validate(tree)
    except ValidationError as exc:
        raise fault_of(exc, model, tree, where) from exc
    for field, message in misread(tree, settings):
        raise RecipeError(message, where=where, field=field)
    return settings


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve() if seen else path
    tree = read_yaml(path, RecipeError)
    if not isinstance(tree, dict):
        raise RecipeError(f"must be a mapping, got {type(tree).__name__}", where=path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise RecipeError(f"must be a path, got {parent!r}", where=path, field="extends")
    parent_path = (path.parent / parent).resolve()
    if len(seen) >= MAX_PARENTS:
        raise RecipeError(f"is the parent of the parent of ... of {MAX_PARENTS} files", where=path)
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
    value = parse_yaml(raw, where="--set", fault=RecipeError, field=dotted)
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
