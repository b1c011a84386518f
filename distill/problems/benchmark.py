"""Questions of a public benchmark, from a folder or from the Hub: `distill.benchmarks` says which and where."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from distill.benchmarks import BENCH_DATA, BENCHMARKS, Benchmark, BenchmarkSplit, Row, hub_identity
from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.problems import hub
from distill.problems.rows import problem_of
from distill.reading.lines import json_rows
from distill.recipe import DEFAULT_LIMITS, BenchmarkSource, DatasetSource, LocalSource, ReadLimits
from distill.records import Problem

T = TypeVar("T")


def read(source: BenchmarkSource, folder: Path | None, limits: ReadLimits) -> list[Problem]:
    """The problems of a recipe's source. Raises what `read_benchmark` raises."""
    return read_benchmark(source.name, source.split, folder, limits)[: source.limit]


def read_benchmark(
    name: str, split: BenchmarkSplit, folder: Path | None, limits: ReadLimits = DEFAULT_LIMITS
) -> list[Problem]:
    """All questions of one split, without any instruction; from the Hub where there is no `folder`.

    Of programs the question says how to answer, as it does everywhere (`distill.problems.code`).

    Raises DataError for a file that is missing or a row that is no question, RecipeError for a repository that there is
    not, EnvironmentFault where the Hub cannot be reached.
    """
    if folder is not None:
        path = benchmark_file(name, split, folder)
        where, rows = str(path), json_rows(path, limits)
    else:
        where, rows = f"{BENCHMARKS[name].repo}[{split}]", _hub_rows(name, split)
    holds = BENCHMARKS[name].tables[split].holds
    problems = [_problem(name, row, place) for place, row in rows if _is_of(holds, row, place)]
    if not problems:
        raise DataError("holds no question", where=where)
    return problems


def benchmark_file(name: str, split: BenchmarkSplit, folder: Path) -> Path:
    """Raises DataError where the folder does not have it."""
    path = folder / BENCHMARKS[name].tables[split].file
    if not path.is_file():
        raise DataError(f"missing benchmark file of {name!r}, split {split}", where=path)
    return path


def describe_benchmark(name: str, split: BenchmarkSplit, folder: Path | None, limits: ReadLimits) -> str:
    """Where the questions are read from. A file is read to its last line, the Hub only asked whether it has them.

    Raises what `read_benchmark` raises.
    """
    if folder is not None:
        return f"{name} {split}: {len(read_benchmark(name, split, folder, limits))} questions in {folder}"
    _ask_the_hub(name, split, hub.check)
    return f"{name} {split}: {BENCHMARKS[name].repo} on the Hub"


def _is_of(holds: Callable[[Row], bool], row: Row, where: str) -> bool:
    try:
        return holds(row)
    except (KeyError, ValueError, TypeError) as exc:
        raise DataError(f"does not say which split it is of ({exc!r})", where=where) from exc


def _problem(name: str, row: Row, where: str) -> Problem:
    benchmark = BENCHMARKS[name]
    try:
        fields = dict(benchmark.fields(row))
        metadata = fields.pop("metadata", {})
        if benchmark.grader == "math":
            return Problem(grader="math", source=name, metadata=metadata, **fields)
    except KeyError as exc:
        raise DataError("missing", where=where, field=str(exc.args[0])) from exc
    except (ValidationError, ValueError, AttributeError, TypeError, LookupError, OSError, zlib.error) as exc:
        raise DataError(f"not a question with an answer: {exc}", where=where) from exc
    problem = problem_of(fields, _columns(benchmark, fields), name=name, where=where)
    return problem.model_copy(update={"metadata": {**problem.metadata, **metadata}})


def _columns(benchmark: Benchmark, fields: Row) -> LocalSource:
    """Where `problem_of` finds what `Benchmark.fields` has read."""
    names = {f"{name}_field": name for name in ("choices", "tests", "setup", "entry_point") if name in fields}
    return LocalSource.model_validate({"path": benchmark.repo, "grader": benchmark.grader, **names})


def _hub_rows(name: str, split: BenchmarkSplit) -> Iterator[tuple[str, dict[str, Any]]]:
    where = f"{BENCHMARKS[name].repo}[{BENCHMARKS[name].tables[split].hub_split}]"
    rows = _ask_the_hub(name, split, hub.load_rows)
    return ((f"{where}: row {number}", row) for number, row in enumerate(rows, start=1))


def _ask_the_hub(name: str, split: BenchmarkSplit, question: Callable[[DatasetSource], T]) -> T:
    """The Hub's answer; where it cannot be reached or asks for consent, the other way to the questions is named."""
    repo = BENCHMARKS[name].repo
    try:
        return question(DatasetSource.model_validate(hub_identity(name, split)))
    except (EnvironmentFault, RecipeError) as exc:
        if BENCHMARKS[name].gated:
            file = BENCHMARKS[name].tables[split].file
            message = (
                f"{repo} is gated: accept its terms at https://huggingface.co/datasets/{repo} and set HF_TOKEN, or put "
                f"{file} into the folder that bench_data or {BENCH_DATA} names ({exc})"
            )
            raise EnvironmentFault(message, where=name) from exc
        if isinstance(exc, RecipeError):
            raise
        message = f"neither bench_data nor {BENCH_DATA} names a folder with its questions, and on the Hub {exc}"
        raise EnvironmentFault(message, where=name) from exc
