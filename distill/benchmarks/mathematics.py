"""Benchmarks of mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.benchmarks.benchmark import Benchmark, Row, Table


def _asked(question: str, reference: Callable[[Row], str]) -> Callable[[Row], Row]:
    """The question stands in one field; `reference` reads the final answer off the row."""

    def fields(row: Row) -> Row:
        read: dict[str, Any] = {"prompt": row[question], "answer": reference(row)}
        # MATH's difficulty, from 1 to 5.
        return read | ({"metadata": {"family": f"level {row['level']}"}} if "level" in row else {})

    return fields


def _after_hashes(row: Row) -> str:
    """GSM8K's reference follows `####` on the last line; thousands separators are no part of the number."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("has no '####' before the final answer")
    return str(answer).strip().replace(",", "")


def _answer(row: Row) -> str:
    return str(row["answer"])


def _expected_answer(row: Row) -> str:
    """Files of AIME 2024 that come with worked solutions call it so."""
    return str(row["expected_answer" if "expected_answer" in row else "answer"])


MATHEMATICS: dict[str, Benchmark] = {
    # Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
    "gsm8k": Benchmark(
        repo="openai/gsm8k",
        config="main",
        tables={"train": Table("gsm8k_train.jsonl", "train"), "test": Table("gsm8k_test.jsonl", "test")},
        fields=_asked("question", _after_hashes),
        licence="mit",
    ),
    # 500 questions of MATH (arXiv 2103.03874), chosen in Let's Verify Step by Step, arXiv 2305.20050.
    "math500": Benchmark(
        repo="HuggingFaceH4/MATH-500",
        tables={"test": Table("math500.jsonl", "test")},
        fields=_asked("problem", _answer),
        licence="mit",
    ),
    # The American Invitational Mathematics Examination: a public competition, whose questions carry no licence.
    "aime24": Benchmark(
        repo="HuggingFaceH4/aime_2024",
        tables={"test": Table("aime24.json", "train")},
        fields=_asked("problem", _expected_answer),
        licence="unknown",
    ),
    "aime25": Benchmark(
        repo="math-ai/aime25",
        tables={"test": Table("aime25.json", "test")},
        fields=_asked("problem", _answer),
        licence="unknown",
    ),
}
