"""The students there are: one YAML file each, read by `distill.recipe.load_student`.

Small published models (SmolLM2, Qwen2.5, Qwen2.5-Coder, Qwen3, Llama 3.2), the six R1-Distill students on Qwen2.5 and
Llama 3 (bases and settings of DeepSeek-R1, arXiv 2501.12948), and four pico students on bases that this project
bundles. A student of one's own is a file of the same form, named by its path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.errors import RecipeError, nearest
from distill.reading.yaml_text import parse_yaml
from distill.recipe import DistillConfig, Method, StudentConfig, load_student

ZOO = Path(__file__).parent


def list_students() -> list[StudentConfig]:
    """Every student of the zoo, smallest first."""
    students = [load_student(path) for path in ZOO.glob("*.yaml")]
    return sorted(students, key=lambda student: (student.num_parameters, student.name))


def sft_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` each, the value as YAML, for `find_student`."""
    parts = (text.partition("=") for text in texts)
    return {name: parse_yaml(value, where="--set", fault=RecipeError, field=name) for name, _, value in parts}


def students_of(config: DistillConfig) -> list[tuple[StudentConfig, tuple[Method, ...]]]:
    """The students of a recipe, in its order, each with the methods by which it learns.

    Raises what `find_student` raises.
    """
    return [(find_student(choice.name, choice.overrides), choice.methods) for choice in config.choices]


def find_student(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudentConfig:
    """A student by its name in the zoo, or by the path of a student file; `overrides` are laid over its `sft` settings.

    Raises RecipeError for a name that is not in the zoo (naming the nearest), and for a file that does not validate.
    """
    text = str(name_or_path)
    bundled = ZOO / f"{text}.yaml"
    if "/" not in text and bundled.is_file():
        return load_student(bundled, overrides)
    if "/" in text or text.endswith((".yaml", ".yml")):
        return load_student(Path(text), overrides)
    known = (path.stem for path in ZOO.glob("*.yaml"))
    raise RecipeError(f"no student {text!r} in the zoo; {nearest(text, known)}", where="students/zoo")
