"""The suites and where their questions come from: local files only, each row checked, each fault one line.

`held_out` and `pico` read the run's own held-out problems (Parquet in the columns of `Problem`); the others read the
public benchmark files from one folder: `eval.bench_data` of the recipe, else the variable POTSTILL_BENCH_DATA.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.errors import DataError, RecipeError, nearest
from distill.reading.lines import json_rows
from distill.recipe import DEFAULT_LIMITS, OWN_SUITES, ReadLimits
from distill.records import Problem

TASKS = Path(__file__).parent / "tasks"
BENCH_DATA = "POTSTILL_BENCH_DATA"


def _gsm8k_answer(row: Mapping[str, Any]) -> str:
    """The reference follows `####` on the last line; thousands separators are no part of the number."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("has no '####' before the final answer")
    return answer.strip().replace(",", "")


# suite -> (file, field of the question, how to read the reference answer)
BENCHMARKS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "gsm8k": ("gsm8k_test.jsonl", "question", _gsm8k_answer),
    "math500": ("math500.jsonl", "problem", lambda row: str(row["answer"])),
    "aime24": (
        "aime24.json",
        "problem",
        lambda row: str(row["expected_answer" if "expected_answer" in row else "answer"]),
    ),
    "aime25": ("aime25.json", "problem", lambda row: str(row["answer"])),
}
SUITES = (*OWN_SUITES, *BENCHMARKS)


def bench_folder(configured: str | None) -> Path:
    """The folder of benchmark files. Raises RecipeError where neither recipe nor environment names one."""
    name = configured or os.environ.get(BENCH_DATA)
    if not name:
        raise RecipeError(f"needed by these suites; or set {BENCH_DATA}", where="recipe", field="eval.bench_data")
    return Path(name)


def check_suites(names: tuple[str, ...], *, bench_data: str | None, limits: ReadLimits = DEFAULT_LIMITS) -> None:
    """Raise RecipeError or DataError for a suite that is unknown, or whose file is not there or not as it should be."""
    for name in names:
        if name not in SUITES:
            raise RecipeError(f"unknown suite {name!r}; {nearest(name, SUITES)}", where="recipe", field="eval.suites")
        if name in BENCHMARKS:
            path = bench_folder(bench_data) / BENCHMARKS[name][0]
            if not path.is_file():
                raise DataError(f"missing benchmark file of suite {name!r}", where=path)
            read_benchmark(name, path.parent, limits)


def read_benchmark(suite: str, folder: Path, limits: ReadLimits = DEFAULT_LIMITS) -> list[Problem]:
    """A public benchmark's questions, without any instruction (the task file adds it). Raises DataError."""
    name, question, answer = BENCHMARKS[suite]
    problems = []
    for where, row in json_rows(folder / name, limits):
        try:
            problem = Problem(prompt=row[question], answer=answer(row), grader="math", source=suite)
        except KeyError as exc:
            raise DataError("missing", where=where, field=str(exc.args[0])) from exc
        except (ValidationError, ValueError, AttributeError) as exc:
            raise DataError(f"not a question with an answer: {exc}", where=where) from exc
        problems.append(problem)
    if not problems:
        raise DataError("holds no question", where=folder / name)
    return problems
