"""The suites and where their questions come from; each fault one line.

`held_out` and `pico` read the run's own held-out problems (Parquet in the columns of `Problem`); the others ask the
test split of a public benchmark (`distill.benchmarks`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distill.benchmarks import BENCHMARKS, parts_of_suites
from distill.errors import RecipeError, nearest
from distill.problems.benchmark import benchmark_file
from distill.progress import Progress
from distill.recipe import LM_EVAL, OWN_SUITES

TASKS = Path(__file__).parent / "tasks"
SUITES = (*OWN_SUITES, *BENCHMARKS)


def check_suites(names: Iterable[str], progress: Progress | None = None) -> None:
    """Raise RecipeError for a suite that is unknown, and for a task of lm-eval's that is refused."""
    named = list(names)
    if tasks := [name.removeprefix(LM_EVAL) for name in named if name.startswith(LM_EVAL)]:
        from eval.lm_eval.tasks import check_tasks

        check_tasks(tasks, progress)
    for name in named:
        if name not in SUITES and not name.startswith(LM_EVAL):
            raise RecipeError(f"unknown suite {name!r}; {nearest(name, SUITES)}", where="recipe", field="eval.suites")


def suite_files(names: Iterable[str], bench_data: Path | None) -> dict[str, Path]:
    """The suites' files, where there is a folder of benchmark files. Raises DataError for one that it does not have."""
    if bench_data is None:
        return {}
    return {name: benchmark_file(name, split, bench_data) for name, split in parts_of_suites(names)}
