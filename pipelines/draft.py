"""A recipe from a few answers: what `potstill init` writes, and what `potstill.Run` runs.

It holds what the answers decide and what one is likely to change next; the rest are the defaults of `distill.recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill.errors import EnvironmentFault, RecipeError, nearest
from distill.problems.look import look_at
from distill.problems.split import HELD_OUT_SHARE
from distill.recipe import LocalSource, Recipe, apply_override, parse
from pipelines.checks import recipe_checks

BUNDLED = "pico"
FIRST = "first-student"  # a recipe that nothing else gives a name
BUNDLED_COUNT = 4_096
MAX_HELD_OUT, MIN_HELD_OUT = 400, 16
OLLAMA_URL = "http://127.0.0.1:11434/v1"
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
TEACHERS = "native:FOLDER, vllm:NAME, openai:MODEL, openai:MODEL@URL or ollama:NAME"

_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


@dataclass(frozen=True)
class Draft:
    """The answers. `problems` is a file, or None for the bundled set; `limit` bounds the questions that are used."""

    name: str
    problems: LocalSource | None
    teacher: Mapping[str, Any]
    student: str
    limit: int | None = None
    num_samples: int = 1

    def text(self) -> str:
        """The recipe as commented YAML. Raises RecipeError for a student that is not there."""
        from students.zoo import find_student

        count = self.limit or BUNDLED_COUNT
        used = {"split", "limit"}  # decided by the template
        source = {} if self.problems is None else self.problems.model_dump(exclude_none=True, exclude=used)
        return _environment.get_template("draft.yaml.jinja").render(
            draft=self,
            source=source,
            count=count,
            held_out=min(MAX_HELD_OUT, max(MIN_HELD_OUT, count // HELD_OUT_SHARE)),
            max_tokens=_room(find_student(self.student).sft.max_length),
        )


def draft_recipe(
    *,
    problems: str,
    teacher: str,
    student: str,
    base_dir: Path,
    name: str | None = None,
    grader: str | None = None,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    limit: int | None = None,
    num_samples: int = 1,
    system_prompt: str | None = None,
) -> Draft:
    """`problems` is a file or `BUNDLED`, `teacher` one of `TEACHERS`; what is not given is read off the file.

    A `system_prompt` of None has a served teacher reason and box its answer, an empty one is none. Raises DataError for
    the file, RecipeError for the teacher.
    """
    source = None
    if problems != BUNDLED:
        source = look_at(
            problems, base_dir=base_dir, grader=grader, prompt_field=prompt_field, answer_field=answer_field
        )
    settings = teacher_settings(teacher)
    if system_prompt is None:
        needs_none = settings["backend"] == "native" or (source is not None and source.grader == "code")
        system_prompt = "" if needs_none else BOXED
    if system_prompt:
        settings["system_prompt"] = system_prompt
    name = name or (FIRST if source is None else name_of(Path(problems)))
    return Draft(name, source, settings, student, limit, num_samples)


def check_draft(text: str, overrides: Iterable[str] = (), *, where: Path | str, base_dir: Path) -> Recipe:
    """The recipe of a draft's text, overridden as by `--set`, with its files and names checked as by `potstill doctor`.

    Raises the first fault. Only a model that is still to be fetched is let through, and a teacher that this machine
    cannot serve: it may be served on another.
    """
    tree = yaml.safe_load(text)
    for override in overrides:
        apply_override(tree, override)
    recipe = parse(Recipe, tree, where=where)
    for name, check in recipe_checks(recipe, base_dir):
        with suppress(EnvironmentFault) if name in ("models", "teacher") else nullcontext():
            check()
    return recipe


def name_of(path: Path) -> str:
    """A recipe's name from that of a file or a folder: `GSM8K train.jsonl` to `gsm8k-train`."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.absolute().name.partition(".")[0].lower()).strip("-._") or FIRST


def teacher_settings(text: str) -> dict[str, Any]:
    """The `teacher` of a recipe from one string, as in `TEACHERS`. Raises RecipeError for one that is none of these."""
    kind, colon, name = text.partition(":")
    if not colon or not name or kind not in _KINDS:
        hint = nearest(kind, _KINDS) if colon else f"write {TEACHERS}"
        raise RecipeError(f"{text!r} is no teacher; {hint}", where="teacher")
    return _KINDS[kind](name)


def _openai(name: str) -> dict[str, Any]:
    """`MODEL@URL`, or `MODEL` at the recipe's default address; a model's own name may have an `@` as well."""
    model, at, address = name.rpartition("@http")
    return {"backend": "openai", **({"model": model, "base_url": f"http{address}"} if at else {"model": name})}


_KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "native": lambda folder: {"backend": "native", "model": folder},
    "vllm": lambda name: {"backend": "vllm", "model": name},
    "openai": _openai,
    "ollama": lambda name: {"backend": "openai", "model": name, "base_url": OLLAMA_URL},
}


def _room(max_length: int) -> int:
    """Tokens of an answer, so that with its question it fits into what the student learns from."""
    return max_length - max(128, max_length // 8)


def _yaml(value: Any) -> str:
    """One value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


_environment.filters["yaml"] = _yaml
