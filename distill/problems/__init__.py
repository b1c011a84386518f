"""Sources of questions: procedural families, local files, data sets of the Hub.

`load_problems` reads any mixture of sources into one list of `Problem`s, each question once. `split_of` is the
boundary between training and evaluation: a procedural question's own text decides on which side it lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.problems import hub, local, reasoning_gym
from distill.problems.split import normalise, split_of
from distill.recipe import (
    DEFAULT_LIMITS,
    GivenSource,
    LocalSource,
    ProblemSource,
    ReadLimits,
    ReasoningGymSource,
    SynthesisedSource,
)
from distill.records import Problem

__all__ = ["given_sources", "iterate_problems", "load_problems", "normalise", "source_files", "split_of"]


def given_sources(sources: Iterable[ProblemSource]) -> list[GivenSource]:
    """The sources that can be read as they are: in the place of a synthesised one those of its seeds."""
    return [
        given for source in sources for given in (source.seeds if isinstance(source, SynthesisedSource) else (source,))
    ]


def load_problems(
    sources: Iterable[GivenSource], *, base_dir: Path, limits: ReadLimits = DEFAULT_LIMITS
) -> list[Problem]:
    """Read all sources, in order; of questions that occur twice (same id) the first stays.

    Relative paths are resolved against `base_dir`; `limits` bound what is read of local files. Raises RecipeError (a
    source that cannot give what is asked), DataError (a file that is not what it should be), EnvironmentFault (the Hub
    cannot be reached).
    """
    problems: dict[str, Problem] = {}
    for problem in iterate_problems(sources, base_dir=base_dir, limits=limits):
        problems.setdefault(problem.id, problem)
    return list(problems.values())


def iterate_problems(
    sources: Iterable[GivenSource], *, base_dir: Path, limits: ReadLimits = DEFAULT_LIMITS
) -> Iterator[Problem]:
    """Yield what `load_problems` loads, one by one, and those that occur twice, twice."""
    for source in sources:
        yield from _read(source, base_dir, limits)


def source_files(sources: Iterable[ProblemSource], *, base_dir: Path) -> dict[str, Path]:
    """The files on this machine that the sources and their seeds read, by the name a manifest lists them under."""
    files = {}
    for source in given_sources(sources):
        if isinstance(source, ReasoningGymSource) and isinstance(source.families, str):
            files[f"problems:{source.families}"] = reasoning_gym.problem_set_path(source.families, base_dir)
        elif isinstance(source, LocalSource):
            files[f"problems:{source.path}"] = local.file_path(source, base_dir)
    return files


def _read(source: GivenSource, base_dir: Path, limits: ReadLimits) -> Iterable[Problem]:
    if isinstance(source, ReasoningGymSource):
        return reasoning_gym.read(source, base_dir)
    if isinstance(source, LocalSource):
        return local.read(source, base_dir, limits)
    return hub.read(source)
