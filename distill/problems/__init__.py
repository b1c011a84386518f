"""Sources of questions: procedural families, local files, data sets of the Hub, benchmarks.

`load_problems` reads any mixture of sources into one list of `Problem`s, each question once. `split_of` is the
boundary between training and evaluation: a procedural question's own text decides on which side it lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.benchmarks import BenchmarkPart
from distill.problems import benchmark, hub, local, reasoning_gym
from distill.problems.split import normalise, split_of
from distill.recipe import (
    DEFAULT_LIMITS,
    BenchmarkSource,
    GivenSource,
    LocalSource,
    ProblemSource,
    ReadLimits,
    ReasoningGymSource,
    SynthesisedSource,
)
from distill.records import Problem

__all__ = [
    "benchmark_parts",
    "given_sources",
    "iterate_problems",
    "load_problems",
    "normalise",
    "source_files",
    "split_of",
]


def given_sources(sources: Iterable[ProblemSource]) -> list[GivenSource]:
    """The sources that can be read as they are: in the place of a synthesised one those of its seeds."""
    return [
        given for source in sources for given in (source.seeds if isinstance(source, SynthesisedSource) else (source,))
    ]


def load_problems(
    sources: Iterable[GivenSource],
    *,
    base_dir: Path,
    limits: ReadLimits = DEFAULT_LIMITS,
    bench_data: Path | None = None,
) -> list[Problem]:
    """Read all sources, in order; of questions that occur twice (same id) the first stays.

    Relative paths are resolved against `base_dir`; `limits` bound what is read of local files; `bench_data` is the
    folder of benchmark files, which come from the Hub without one. Raises RecipeError (a source that cannot give what
    is asked), DataError (a file that is not what it should be), EnvironmentFault (the Hub cannot be reached).
    """
    problems: dict[str, Problem] = {}
    for problem in iterate_problems(sources, base_dir=base_dir, limits=limits, bench_data=bench_data):
        problems.setdefault(problem.id, problem)
    return list(problems.values())


def iterate_problems(
    sources: Iterable[GivenSource],
    *,
    base_dir: Path,
    limits: ReadLimits = DEFAULT_LIMITS,
    bench_data: Path | None = None,
) -> Iterator[Problem]:
    """Yield what `load_problems` loads, one by one, and those that occur twice, twice."""
    for source in sources:
        yield from _read(source, base_dir, limits, bench_data)


def benchmark_parts(sources: Iterable[ProblemSource]) -> list[BenchmarkPart]:
    """The splits of benchmarks that are among the sources and their seeds."""
    return [(source.name, source.split) for source in given_sources(sources) if isinstance(source, BenchmarkSource)]


def source_files(
    sources: Iterable[ProblemSource], *, base_dir: Path, bench_data: Path | None = None
) -> dict[str, Path]:
    """The files on this machine that the sources and their seeds read, by the name a manifest lists them under."""
    files = {}
    for source in given_sources(sources):
        if isinstance(source, ReasoningGymSource) and isinstance(source.families, str):
            files[f"problems:{source.families}"] = reasoning_gym.problem_set_path(source.families, base_dir)
        elif isinstance(source, LocalSource):
            files[f"problems:{source.path}"] = local.file_path(source, base_dir)
        elif isinstance(source, BenchmarkSource) and bench_data is not None:
            name = f"problems:{source.name}/{source.split}"
            files[name] = benchmark.benchmark_file(source.name, source.split, bench_data)
    return files


def _read(source: GivenSource, base_dir: Path, limits: ReadLimits, bench_data: Path | None) -> Iterable[Problem]:
    if isinstance(source, ReasoningGymSource):
        return reasoning_gym.read(source, base_dir)
    if isinstance(source, LocalSource):
        return local.read(source, base_dir, limits)
    if isinstance(source, BenchmarkSource):
        return benchmark.read(source, bench_data, limits)
    return hub.read(source)
