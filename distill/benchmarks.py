"""The public benchmarks that potstill knows, for training questions and for suites alike, and where they are found.

Each has its files in a folder (`bench_data` of the recipe, else the variable POTSTILL_BENCH_DATA) and its repository on
the Hugging Face Hub. One rule says which is read: the folder where one is named, else the Hub. No commit of the Hub is
pinned: revisions are `main`, so that a repository that changes is seen only where its questions are read again.
`distill.problems.benchmark` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BENCH_DATA = "POTSTILL_BENCH_DATA"

BenchmarkSplit = Literal["train", "test"]
BenchmarkPart = tuple[str, BenchmarkSplit]  # a benchmark's name, and a split that it has


@dataclass(frozen=True)
class Table:
    """One split of a benchmark: its file in the folder (JSON Lines), and its split on the Hub."""

    file: str
    hub_split: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of mathematics. `reference` reads the final answer off a row; KeyError and ValueError say it cannot.

    `family` is the part of the benchmark that a row belongs to, where it has parts; `licence` is that of the questions,
    by the Hub's identifier.
    """

    repo: str
    tables: Mapping[BenchmarkSplit, Table]
    question: str
    reference: Callable[[Mapping[str, Any]], str]
    licence: str
    family: Callable[[Mapping[str, Any]], str | None] = lambda row: None
    config: str | None = None
    revision: str = "main"


def _after_hashes(row: Mapping[str, Any]) -> str:
    """GSM8K's reference follows `####` on the last line; thousands separators are no part of the number."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("has no '####' before the final answer")
    return str(answer).strip().replace(",", "")


def _answer(row: Mapping[str, Any]) -> str:
    return str(row["answer"])


def _level(row: Mapping[str, Any]) -> str | None:
    """MATH's difficulty, from 1 to 5."""
    return f"level {row['level']}" if "level" in row else None


def _expected_answer(row: Mapping[str, Any]) -> str:
    """Files of AIME 2024 that come with worked solutions call it so."""
    return str(row["expected_answer" if "expected_answer" in row else "answer"])


BENCHMARKS: dict[str, Benchmark] = {
    # Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
    "gsm8k": Benchmark(
        repo="openai/gsm8k",
        config="main",
        tables={"train": Table("gsm8k_train.jsonl", "train"), "test": Table("gsm8k_test.jsonl", "test")},
        question="question",
        reference=_after_hashes,
        licence="mit",
    ),
    # 500 questions of MATH (arXiv 2103.03874), chosen in Let's Verify Step by Step, arXiv 2305.20050.
    "math500": Benchmark(
        repo="HuggingFaceH4/MATH-500",
        tables={"test": Table("math500.jsonl", "test")},
        question="problem",
        reference=_answer,
        family=_level,
        licence="mit",
    ),
    # The American Invitational Mathematics Examination: a public competition, whose questions carry no licence.
    "aime24": Benchmark(
        repo="HuggingFaceH4/aime_2024",
        tables={"test": Table("aime24.json", "train")},
        question="problem",
        reference=_expected_answer,
        licence="unknown",
    ),
    "aime25": Benchmark(
        repo="math-ai/aime25",
        tables={"test": Table("aime25.json", "test")},
        question="problem",
        reference=_answer,
        licence="unknown",
    ),
}


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
