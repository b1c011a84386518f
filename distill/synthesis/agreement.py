"""The reference of a question that has none: the answer that enough of its samples give (self-consistency).

Which answers are the same: `distill.verify.votes`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from distill.protocols import Verifier
from distill.records import Problem
from distill.verify.votes import by_normal_form, same_answers

NO_ANSWER = "no answer"


class Agreement(NamedTuple):
    """The answer that most samples give, in its most frequent spelling (of equals the first), and how many they are."""

    answer: str
    num_agreeing: int
    num_votes: int

    @property
    def in_words(self) -> str:
        return f"{self.num_agreeing} of {self.num_votes} samples agree" if self.num_agreeing else NO_ANSWER


def agreements(
    questions: Sequence[tuple[Problem, Sequence[str | None]]], min_agreement: float, verifier: Verifier
) -> list[Agreement]:
    """One a question, which stands with its samples' answers (None: no answer, or cut off).

    The grader is asked only about questions that normal forms leave below `min_agreement`, a share of all samples.
    """
    grouped = [by_normal_form(votes) for _, votes in questions]
    pairs = [
        (number, one, other)
        for number, (groups, (_, votes)) in enumerate(zip(grouped, questions, strict=True))
        if _is_open(groups, len(votes), min_agreement)
        for one, other in combinations(groups, 2)
    ]
    problems = [problem for problem, _ in questions]
    joined = same_answers(list(zip(problems, grouped, strict=True)), pairs, verifier)
    return [
        _winner(groups, names, len(votes)) for groups, names, (_, votes) in zip(grouped, joined, questions, strict=True)
    ]


def enough(num_votes: int, min_agreement: float) -> int:
    """Samples that must agree."""
    return math.ceil(min_agreement * num_votes - 1e-9)  # 0.6 of 5 is 3, whatever floats make of it


def _is_open(groups: dict[str, list[str]], num_votes: int, min_agreement: float) -> bool:
    """Could equal answers of other forms still bring one over the bar?"""
    needed, sizes = enough(num_votes, min_agreement), [len(group) for group in groups.values()]
    return len(sizes) > 1 and max(sizes) < needed <= sum(sizes)


def _winner(groups: dict[str, list[str]], names: dict[str, str], num_votes: int) -> Agreement:
    together: dict[str, list[str]] = {}
    for form, spellings in groups.items():
        together.setdefault(names[form], []).extend(spellings)
    if not together:
        return Agreement("", 0, num_votes)
    best = max(together.values(), key=len)
    return Agreement(Counter(best).most_common(1)[0][0], len(best), num_votes)
