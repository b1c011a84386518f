"""Answers of every kind that graders were reported to misjudge, each with what it is worth against its reference.

`grader_cases.jsonl` was made from 39 public reports, in numbers of its own; `further_cases.yaml` has more of each kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from distill.protocols import Verifier
from distill.recipe import VerifyConfig
from distill.records import FinishReason, Problem
from distill.verify import open_verifier

HERE = Path(__file__).parent


class Case(NamedTuple):
    category: str
    problem: Problem
    text: str
    finish_reason: FinishReason
    expected: str  # a state, or "not correct"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with open_verifier(VerifyConfig(num_workers=2, timeout_s=20)) as verifier:
        yield verifier


def problem(reference: str, question: str, choices: list[str] | None) -> Problem:
    return Problem(
        prompt=question,
        answer=reference,
        grader="choice" if choices else "math",
        source="cases",
        metadata={"choices": choices} if choices else {},
    )


def reported() -> list[Case]:
    rows = [json.loads(line) for line in (HERE / "grader_cases.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Case(
            row["category"],
            problem(row["gold"], row["question"], row.get("choices")),
            row["prediction"],
            row["finish"],
            row["expected"],
        )
        for row in rows
    ]


def further() -> list[Case]:
    kinds = yaml.safe_load((HERE / "further_cases.yaml").read_text(encoding="utf-8"))
    return [
        Case(kind, problem(one["gold"], one.get("question", "What is it?"), one.get("choices")), text, "stop", expected)
        for kind, references in kinds.items()
        for one in references
        for text, expected in [
            *((f"So it is \\boxed{{{answer}}}.", "correct") for answer in one.get("correct", [])),
            *((f"So it is \\boxed{{{answer}}}.", "wrong") for answer in one.get("wrong", [])),
            *one.get("texts", []),
        ]
    ]


def misjudged(verifier: Verifier, cases: list[Case]) -> list[str]:
    verdicts = verifier.verify([(case.problem, case.text, case.finish_reason) for case in cases])
    return [
        f"{case.category}: {case.problem.answer!r} and {verdict.extracted!r} are {verdict.state} ({verdict.detail})"
        for case, verdict in zip(cases, verdicts, strict=True)
        if (verdict.state == "correct" if case.expected == "not correct" else verdict.state != case.expected)
    ]


@pytest.mark.slow
def test_no_reported_answer_is_misjudged(verifier: Verifier) -> None:
    cases = reported()
    assert len(cases) == 470
    assert misjudged(verifier, cases) == []


@pytest.mark.slow
def test_no_further_answer_of_these_kinds_is_misjudged(verifier: Verifier) -> None:
    assert misjudged(verifier, further()) == []


def test_of_every_kind_one_right_and_one_wrong_answer(verifier: Verifier) -> None:
    first = {(case.category, case.expected): case for case in [*reported(), *further()]}
    assert misjudged(verifier, list(first.values())) == []


@pytest.mark.slow
def test_references_equal_themselves_and_not_their_neighbours(verifier: Verifier) -> None:
    references = list(dict.fromkeys(case.problem.answer or "" for case in further() if case.problem.grader == "math"))
    cases = [
        Case("itself", problem(reference, "What is it?", None), f"\\boxed{{{reference}}}", "stop", "correct")
        for reference in references
    ]
    cases += [
        Case("another", problem(reference, "What is it?", None), f"\\boxed{{{other}}}", "stop", "not correct")
        for reference, other in pairwise(references)
    ]
    assert misjudged(verifier, cases) == []
