"""Which of several answers to one question are the same: majorities count meanings, not spellings.

Two answers are the same where their normal forms are (`distill.verify.audit`), and else where the grader finds them
equal, one of them taken for the reference: `1/2`, `0.5` and `\\frac{2}{4}` are three votes for one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.protocols import Verifier
from distill.records import Problem
from distill.verify.audit import normal_form
from distill.verify.extract import bare_answer

Groups = Mapping[str, Sequence[str]]  # spellings by normal form, in the order of the votes
Pair = tuple[int, str, str]  # a question's number and two of its normal forms, which may be the same answer


def by_normal_form(votes: Sequence[str | None]) -> dict[str, list[str]]:
    """`votes` are a question's answers; None, or nothing but space, is no vote."""
    groups: dict[str, list[str]] = {}
    for vote in votes:
        if vote is not None and vote.strip():
            groups.setdefault(normal_form(vote), []).append(vote)
    return groups


def same_answers(
    questions: Sequence[tuple[Problem, Groups]], pairs: Sequence[Pair], verifier: Verifier
) -> list[dict[str, str]]:
    """For each question the answer that a normal form stands for, named by the first form that is the same.

    The grader decides on `pairs` and on nothing else.
    """
    asked = [
        (
            questions[number][0].model_copy(update={"answer": questions[number][1][one][0]}),
            bare_answer(questions[number][1][other][0], "math"),
            "stop",
        )
        for number, one, other in pairs
    ]
    names = [{form: form for form in groups} for _, groups in questions]
    for (number, one, other), verdict in zip(pairs, verifier.verify(asked), strict=True):  # type: ignore[arg-type]
        if verdict.correct:
            _join(names[number], one, other)
    return names


def _join(names: dict[str, str], one: str, other: str) -> None:
    kept, gone = names[one], names[other]
    for form, name in names.items():
        if name == gone:
            names[form] = kept
