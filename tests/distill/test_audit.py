"""The second grader: normal forms, disagreement and its interval, references that nobody agrees with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from distill.intervals import wilson
from distill.recipe import VerifyConfig
from distill.records import Problem
from distill.verify.audit import Audit, AuditSummary, second_opinion


@pytest.mark.parametrize(
    ("one", "other", "opinion"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\dfrac12", "\\frac{2}{4}", True),
        ("-\\frac{1}{2}", "\\frac{-1}{2}", True),
        ("-\\frac{1}{2}", "\\frac{1}{2}", False),
        ("1000", "1,000", True),
        ("1000", "x = 1000.0", True),
        ("5", "5^\\circ", True),
        ("5", "5 \\text{ cm}", True),
        ("10", "\\$10", True),
        ("10", "$10$.", True),
        ("\\text{Yes}", "yes", True),
        ("7", "8", False),
        ("0.333333", "\\frac{1}{3}", False),
        ("x+1", "1+x", None),
        ("(1,2)", "(1, 2)", True),
        ("1,2", "12", None),
        ("\\sqrt{2}", "1.41", None),
        ("1/0", "1", None),
        ("9" * 5_000, "9" * 5_000, True),
        ("9" * 5_000, "9" * 4_999, None),
    ],
)
def test_second_opinions(one: str, other: str, opinion: bool | None) -> None:
    assert second_opinion(one, other) is opinion
    assert second_opinion(other, one) is opinion


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(alphabet="\\frac{}12/.,-x=$", max_size=40))
def test_no_text_breaks_the_second_grader(text: str, latex: str) -> None:
    for one in (text, latex, text + latex):
        assert second_opinion(one, one) is True
        assert second_opinion(one, "1") in (True, False, None)


def problem(number: int, answer: str | None = "7", grader: Any = "math") -> Problem:
    return Problem(prompt=f"Question {number}?", answer=answer, grader=grader, source="s")


def audited(problems: list[Problem], rows: list[tuple[int, str, str | None]], **config: Any) -> Audit:
    audit = Audit({one.id: one for one in problems}, VerifyConfig(**config))
    for number, (which, state, extracted) in enumerate(rows):
        audit.add(problems[which].id, f"k{number}", state, extracted)  # type: ignore[arg-type]
    return audit


def test_disagreements_are_counted_both_ways() -> None:
    rows: list[tuple[int, str, str | None]] = [
        *[(0, "correct", "7")] * 6,
        (0, "correct", "8"),  # the first grader is too generous
        (0, "wrong", "7.0"),  # too strict
        (0, "wrong", "8"),
        (0, "wrong", "x"),  # the second cannot tell
        (0, "timeout", "7"),
        (0, "wrong", None),
    ]
    summary = audited([problem(0)], rows).summary()
    assert [summary.answers, summary.decided_by_both, summary.disagreements] == [10, 9, 2]
    assert [summary.accepted_by_the_first_alone, summary.accepted_by_the_second_alone] == [1, 1]
    assert summary.rate == pytest.approx(2 / 9)
    assert summary.ci95 == wilson(2, 9)
    assert audited([problem(0)], []).summary().ci95 is None
    assert [(one.key, one.first, one.second) for one in summary.examples] == [
        ("k6", "correct", "wrong"),
        ("k7", "wrong", "correct"),
    ]


def test_a_reference_that_nobody_agrees_with_is_suspected() -> None:
    problems = [
        problem(0),  # four of five say 5, in three spellings
        problem(1),  # one was right
        problem(2),  # too few
        problem(3),  # no majority
        problem(4, grader="reasoning_gym"),
        problem(5, answer=None),
        problem(6, grader="code"),
    ]
    rows: list[tuple[int, str, str | None]] = [
        *[(0, "wrong", answer) for answer in ("5", "5.0", "x=5", "5", "6")],
        *[(1, "wrong", "5")] * 9,
        (1, "correct", "7"),
        *[(2, "wrong", "5")] * 3,
        *[(3, "wrong", answer) for answer in "1234"],
        *[(4, "wrong", "5")] * 4,
        *[(5, "unverifiable", "5")] * 4,
        *[(6, "wrong", "print(1)")] * 4,
    ]
    found = {one.problem_id: one for one in audited(problems, rows).suspects()}
    assert list(found) == [problems[0].id, problems[4].id]
    first = found[problems[0].id]
    assert (first.majority, first.num_agreeing, first.num_answers, first.relabelled) == ("5", 4, 5, False)
    on_request = audited(problems, rows, relabel="majority")
    assert [one.relabelled for one in on_request.suspects()] == [True, False]  # a procedural one stays
    said = on_request.summary()
    assert (len(said.suspected_references), len(said.relabelled), said.num_relabelled_samples) == (2, 1, 4)
    assert (said.relabel, audited(problems, rows).summary().relabel) == ("majority", "never")
    assert AuditSummary.model_validate_json(said.model_dump_json()) == said
    assert not list(audited(problems, rows, suspect_min_share=0.9, suspect_min_samples=5).suspects())
