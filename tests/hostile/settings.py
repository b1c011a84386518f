"""Recipes, student files and jobs: YAML that is nested, refers to itself, or is no file."""

from __future__ import annotations

import os
from pathlib import Path

from tests.hostile.case import (
    DEEP,
    DOCTOR,
    RUN,
    cases,
    content,
    deep_json,
    in_a_circle,
    instead,
    recipe,
    without_end,
)

OF_RECIPE = (DOCTOR, RUN)
OF_STUDENT = (("zoo", "show", "./student.yaml"), DOCTOR)
OF_JOB = (("launch", "job.yaml", "--dry-run"),)


def alias_bomb(levels: int) -> str:
    """Each level names the one before ten times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def _merge_bomb(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], y{n}: 1}}" for n in range(1, levels)]
    return "\n".join(lines)


def _parents(world: Path) -> None:
    for number in range(1_000):
        (world / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
    (world / "recipe.yaml").write_text("extends: r0.yaml\n")


CASES = [
    *cases(
        OF_RECIPE,
        {
            "trusted-by-a-flag": (
                recipe(teacher={"backend": "vllm", "model": "base", "flags": {"trust-remote-code": True}}),
                "trust-remote-code",
            ),
            "deep-recipe": (content("recipe.yaml", "a: " + deep_json()), "recipe.yaml: not valid YAML: nested"),
            "recipe-deep-in-blocks": (content("recipe.yaml", "- " * DEEP + "x"), "recipe.yaml: not valid YAML: nested"),
            "recipe-of-aliases": (content("recipe.yaml", alias_bomb(12)), "recipe.yaml: not valid YAML: holds more"),
            "recipe-of-merged-aliases": (content("recipe.yaml", _merge_bomb(12)), "recipe.yaml: not valid YAML: holds"),
            "recipe-of-itself": (content("recipe.yaml", "a: &a [*a]"), "recipe.yaml: not valid YAML: *a"),
            "recipe-with-a-million-digits": (
                content("recipe.yaml", "name: " + "9" * 10**6),
                "recipe.yaml: not valid YAML",
            ),
            "recipe-with-a-large-number": (
                content("recipe.yaml", "name: " + "9" * 4000),
                "recipe.yaml: not valid YAML",
            ),
            "recipe-with-a-bad-date": (content("recipe.yaml", "name: 2024-99-99"), "recipe.yaml: not valid YAML"),
            "recipe-with-an-object": (
                content("recipe.yaml", "a: !!python/object/apply:os.system ['touch TRAP']"),
                "recipe.yaml: not valid YAML",
            ),
            "recipe-with-a-key-twice": (content("recipe.yaml", "name: a\nname: b\n"), "'name' is given twice"),
            "recipe-of-many-keys": (content("recipe.yaml", "".join(f"k{n}: 1\n" for n in range(90000))), "recipe.yaml"),
            "recipe-of-megabytes": (content("recipe.yaml", "#" * (2 << 20)), "recipe.yaml: cannot be read"),
            "recipe-as-a-pipe": (instead("recipe.yaml", os.mkfifo), "recipe.yaml: cannot be read (it is a pipe)"),
            "recipe-as-a-folder": (instead("recipe.yaml", Path.mkdir), "recipe.yaml: cannot be read (it is a folder)"),
            "recipe-in-a-circle": (instead("recipe.yaml", in_a_circle), "recipe.yaml: cannot be read"),
            "recipe-without-end": (instead("recipe.yaml", without_end), "recipe.yaml: cannot be read (it is a device)"),
            "recipe-of-another-encoding": (content("recipe.yaml", b"name: gr\xfc\xdfe"), "recipe.yaml: cannot be read"),
            "recipe-with-nul": (content("recipe.yaml", b"name: a\x00b"), "recipe.yaml: not valid YAML"),
            "recipe-of-a-thousand-parents": (_parents, "is the parent of"),
        },
    ),
    *cases(
        OF_STUDENT,
        {
            "deep-student": (content("student.yaml", "a: " + deep_json()), "student.yaml: not valid YAML: nested"),
            "student-of-aliases": (content("student.yaml", alias_bomb(12)), "student.yaml: not valid YAML: holds more"),
            "student-with-an-object": (
                content("student.yaml", "a: !!python/name:os.system"),
                "student.yaml: not valid",
            ),
            "student-without-end": (instead("student.yaml", without_end), "student.yaml: cannot be read"),
        },
    ),
    *cases(
        OF_JOB,
        {
            "deep-job": (content("job.yaml", "a: " + deep_json()), "job.yaml: not valid YAML: nested"),
            "job-of-aliases": (content("job.yaml", alias_bomb(12)), "job.yaml: not valid YAML: holds more"),
            "job-with-an-object": (content("job.yaml", "!!python/object/apply:os.system ['touch TRAP']"), "job.yaml"),
            "job-as-a-pipe": (instead("job.yaml", os.mkfifo), "job.yaml: cannot be read (it is a pipe)"),
        },
    ),
]
