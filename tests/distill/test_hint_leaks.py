"""Traces that speak of the hint they had, and traces that only use the same words."""

from __future__ import annotations

import pytest

from distill.curate.hint_leaks import hint_leak


@pytest.mark.parametrize(
    "text",
    [
        "The hint says that it is 7.",
        "As given, the result must be 12, so x = 3.",
        "The answer is known to be 42, hence we work back.",
        "Since the final answer is given as 18, each costs 6.",
        "We know the answer is 5.",
        "We are told that the answer is 9.",
        "This matches the given answer.",
        "It agrees with the provided\nanswer of 4.",
        "so this is the expected result, 3",
        "Working backwards from the known answer, 20 - 4 = 16.",
        "I will pretend I don't know it and derive it.",
        "The correct answer was provided: 11.",
    ],
)
def test_what_speaks_of_the_hint_is_found(text: str) -> None:
    assert hint_leak(f"Let us see. {text} Thus \\boxed{{7}}.") is not None


@pytest.mark.parametrize(
    "text",
    [
        "As given in the problem, Ann has 3 apples.",
        "We know that the sum of the angles is 180.",
        "Given that x = 3, the answer is 7.",
        "The answer is \\boxed{7}.",
        "The total is given by 3 * 4 = 12.",
        "The number of known primes below ten is 4, so the solution is 4.",
        "We are told that Bob gives the answer sheet to Ann.",
    ],
)
def test_the_same_words_of_a_problem_are_none(text: str) -> None:
    assert hint_leak(text) is None
