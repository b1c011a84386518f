"""The suites and where their questions come from; each fault one line.

`held_out` and `pico` read the run's own held-out problems (Parquet in the columns of `Problem`), and so do suites whose
problems the recipe brings (`eval.own`); the others ask the test split of a public benchmark (`distill.benchmarks`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from distill.benchmarks import BENCHMARKS, BenchmarkPart, parts_of_suites
from distill.errors import RecipeError, nearest
from distill.problems import benchmark_parts
from distill.problems.benchmark import benchmark_file
from distill.progress import Progress
from distill.recipe import LM_EVAL, OWN_SUITES, EvalConfig, GivenSource

TASKS = Path(__file__).parent / "tasks"
HELD_OUT = "held_out"
SUITES = (*OWN_SUITES, *BENCHMARKS)


def check_suites(names: Iterable[str], own: Collection[str] = (), progress: Progress | None = None) -> None:
    """Raise RecipeError for a suite that is unknown, and for a task of lm-eval's that is refused.

    `own` are those that the recipe brings problems for.
    """
    named, known = list(names), (*SUITES, *own)
    if tasks := [name.removeprefix(LM_EVAL) for name in named if name.startswith(LM_EVAL)]:
        from eval.lm_eval.tasks import check_tasks

        check_tasks(tasks, progress)
    for name in named:
        if name not in known and not name.startswith(LM_EVAL):
            raise RecipeError(f"unknown suite {name!r}; {nearest(name, known)}", where="recipe", field="eval.suites")


def own_suites(config: EvalConfig) -> dict[str, GivenSource]:
    """The problems that the recipe brings itself: its suites', and `held_out`, which `pico` asks as well."""
    held_out: dict[str, GivenSource] = {} if config.held_out is None else {HELD_OUT: config.held_out}
    return held_out | dict(config.own)


def parts_asked(config: EvalConfig) -> list[BenchmarkPart]:
    """The splits of benchmarks that the suites ask, those that have a name of the recipe's among them."""
    return [*parts_of_suites(config.suites), *benchmark_parts(config.own.values())]


def own_suite_file(name: str, eval_dir: Path) -> Path:
    """Where a run keeps the problems of a suite of its own."""
    return eval_dir / f"{HELD_OUT if name in OWN_SUITES else name}.parquet"


def suite_files(names: Iterable[str], bench_data: Path | None) -> dict[str, Path]:
    """The suites' files, where there is a folder of benchmark files. Raises DataError for one that it does not have."""
    if bench_data is None:
        return {}
    return {name: benchmark_file(name, split, bench_data) for name, split in parts_of_suites(names)}
