"""The public benchmarks that potstill knows, for training questions and for suites alike, and where they are found.

Each has its files in a folder (`bench_data` of the recipe, else the variable POTSTILL_BENCH_DATA) and its repository on
the Hugging Face Hub. One rule says which is read: the folder where one is named, else the Hub. No commit of the Hub is
pinned: revisions are `main`, so that a repository that changes is seen only where its questions are read again.
`distill.problems.benchmark` reads them; `mathematics`, `choices` and `programs` have them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.benchmarks.benchmark import Benchmark, BenchmarkSplit, Row, Table
from distill.benchmarks.choices import CHOICES
from distill.benchmarks.mathematics import MATHEMATICS
from distill.benchmarks.programs import PROGRAMS

__all__ = [
    "BENCHMARKS",
    "BENCH_DATA",
    "Benchmark",
    "BenchmarkPart",
    "BenchmarkSplit",
    "Row",
    "Table",
    "bench_folder",
    "hub_identities",
    "hub_identity",
    "parts_of_suites",
]

BENCH_DATA = "POTSTILL_BENCH_DATA"
BenchmarkPart = tuple[str, BenchmarkSplit]  # a benchmark's name, and a split that it has
BENCHMARKS: dict[str, Benchmark] = {**MATHEMATICS, **CHOICES, **PROGRAMS}


def bench_folder(configured: str | Path | None, base_dir: Path = Path()) -> Path | None:
    """The folder of benchmark files: what the recipe says, else the environment; None where both say nothing.

    Relative paths start at `base_dir`.
    """
    name = configured or os.environ.get(BENCH_DATA)
    return base_dir / name if name else None


def parts_of_suites(suites: Iterable[str]) -> list[BenchmarkPart]:
    """What the suites among these that are benchmarks ask: their test splits."""
    return [(suite, "test") for suite in suites if suite in BENCHMARKS]


def hub_identity(name: str, split: BenchmarkSplit) -> dict[str, str | None]:
    """A split on the Hub, as `datasets` is asked for it."""
    benchmark = BENCHMARKS[name]
    table = benchmark.tables[split]
    return {
        "repo": benchmark.repo,
        "revision": benchmark.revision,
        "config": benchmark.config,
        "split": table.hub_split,
    }


def hub_identities(parts: Iterable[BenchmarkPart], folder: Path | None) -> dict[str, Any]:
    """What a stage that reads these depends on beside files: settings for its config, none where there is a folder."""
    identities = {f"{name}/{split}": hub_identity(name, split) for name, split in parts} if folder is None else {}
    return {"hub": identities} if identities else {}
