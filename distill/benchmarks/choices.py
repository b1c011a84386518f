"""Benchmarks of multiple choice. Names of their fields as lm-eval's task files (0.4.13) read them: none of these sets
was at hand when this was written.
"""

from __future__ import annotations

import hashlib

from distill.benchmarks.benchmark import Benchmark, Row, Table

GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(row: Row) -> Row:
    """The right answer comes first in every row: choices are put in the order of their hashes.

    So a question has one order everywhere and for ever, and the right letter is any of the four. The prompt, which
    every sample is kept with, lists them in it.
    """
    question = str(row["Question"]).strip()
    choices = [str(row[name]).strip() for name in GPQA_CHOICES]
    right, shuffled = choices[0], sorted(choices, key=lambda choice: _digest(f"{question}\0{choice}"))
    family = {"family": str(row["High-level domain"])} if "High-level domain" in row else {}
    return {"prompt": question, "answer": right, "choices": shuffled, "metadata": family}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _mmlu_pro(row: Row) -> Row:
    return {
        "prompt": row["question"],
        "answer": row["answer"],
        "choices": [str(option).strip() for option in row["options"]],
        "metadata": {"family": str(row["category"])},
    }


def _arc(row: Row) -> Row:
    """Labels of a few questions are numbers: `choices` says which."""
    return {"prompt": row["question"], "answer": row["answerKey"], "choices": row["choices"]}


def _arc_tables(name: str) -> dict[str, Table]:
    return {"train": Table(f"{name}_train.jsonl", "train"), "test": Table(f"{name}_test.jsonl", "test")}


CHOICES: dict[str, Benchmark] = {
    # A Graduate-Level Google-Proof Q&A Benchmark, arXiv 2311.12022. Its authors ask that it not be published again.
    "gpqa_diamond": Benchmark(
        repo="Idavidrein/gpqa",
        config="gpqa_diamond",
        tables={"test": Table("gpqa_diamond.jsonl", "train")},
        fields=_gpqa,
        licence="unknown",
        grader="choice",
        gated=True,
    ),
    # MMLU-Pro, arXiv 2406.01574: up to ten options, 14 categories.
    "mmlu_pro": Benchmark(
        repo="TIGER-Lab/MMLU-Pro",
        tables={"test": Table("mmlu_pro.jsonl", "test")},
        fields=_mmlu_pro,
        licence="unknown",
        grader="choice",
    ),
    # AI2 Reasoning Challenge, arXiv 1803.05457.
    "arc_challenge": Benchmark(
        repo="allenai/ai2_arc",
        config="ARC-Challenge",
        tables=_arc_tables("arc_challenge"),  # type: ignore[arg-type]
        fields=_arc,
        licence="unknown",
        grader="choice",
    ),
    "arc_easy": Benchmark(
        repo="allenai/ai2_arc",
        config="ARC-Easy",
        tables=_arc_tables("arc_easy"),  # type: ignore[arg-type]
        fields=_arc,
        licence="unknown",
        grader="choice",
    ),
}
