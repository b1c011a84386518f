"""A world in which the whole chain runs in seconds: random models, a few sums, one student."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.repository import REPOSITORY
from tests.students.tiny_bases import make_base
from tests.teacher.v3_models import tiny_config, write_model_folder

COMMAND = (sys.executable, "-c", "from pipelines.cli import main; main()")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def potstill(
    *arguments: str | Path, cwd: Path = REPOSITORY, timeout_s: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def without_progress(stderr: str) -> str:
    """Standard error but for progress, which is a line every ten seconds: a busy machine gets so far."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("  "))


def make_world(folder: Path) -> Path:
    """Teacher, base, student file, prompts and a recipe that names them by absolute paths; returns the recipe."""
    write_model_folder(folder / "teacher", tiny_config(), fp8=True, std=0.1)
    make_base(folder / "base")
    student = {
        "name": "tiny",
        "base": str(folder / "base"),
        "architecture": "qwen2",
        "num_parameters": 20_000,
        "licence": "apache-2.0",
        "chat_template": str(REPOSITORY / "students/templates/chatml_think.jinja"),
        "eos_token": "<|im_end|>",
        "sft": {"lr": 1e-3, "num_epochs": 1, "batch_size": 4, "max_length": 256, "dtype": "float32", "save_steps": 2},
    }
    write_yaml(folder / "student.yaml", student)
    rows = [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(24)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sampling = {"max_tokens": 24, "seed": 5}
    recipe = {
        "name": "tiny-world",
        "problems": [{"kind": "local", "path": str(folder / "prompts.jsonl")}],
        "teacher": {"backend": "native", "model": str(folder / "teacher"), "batch_size": 8},
        "generate": {"num_samples": 2, "sampling": sampling},
        # The teacher is random: its traces are wrong, and learned from all the same.
        "curate": {"correct_only": False, "complete_reasoning": False, "max_repetition": None},
        "distill": {"students": [str(folder / "student.yaml")], "methods": ["distilled", "direct"]},
        "eval": {
            "held_out": {"families": {"chain_sum": {"max_terms": 2}}, "count": 4, "split": "held_out"},
            "num_samples": 2,
            "sampling": sampling,
            "batch_size": 8,
        },
    }
    return write_yaml(folder / "recipe.yaml", recipe)


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
