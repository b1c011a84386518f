"""What a benchmark is: where its rows are, and how one of them becomes a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill.records import Grader

BenchmarkSplit = Literal["train", "test"]
Row = Mapping[str, Any]  # as it is published


@dataclass(frozen=True)
class Table:
    """One split of a benchmark: its file in the folder (JSON Lines), and its split on the Hub.

    `holds` tells the split's rows from others that stand in the same file.
    """

    file: str
    hub_split: str
    holds: Callable[[Row], bool] = lambda row: True


@dataclass(frozen=True)
class Benchmark:
    """A public set of questions.

    `fields` reads a row: `prompt` and `answer`; for multiple choice `choices`; for programs `tests`, and where there
    are such `setup` and `entry_point` (`distill.problems.code`); `metadata` is added to the problem's own, its `family`
    is the part of the benchmark that a row belongs to. KeyError and ValueError say that a row is no question.
    `licence` is that of the questions, by the Hub's identifier. `gated`: the Hub gives it to those alone who have
    accepted its terms.
    """

    repo: str
    tables: Mapping[BenchmarkSplit, Table]
    fields: Callable[[Row], Row]
    licence: str
    grader: Grader = "math"
    config: str | None = None
    revision: str = "main"
    gated: bool = False
