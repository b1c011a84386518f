"""Which problems get another round."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from distill.adaptive import wants_more
from distill.errors import RecipeError
from distill.recipe import AdaptiveSampling, GenerateConfig, parse

POLICY = AdaptiveSampling(max_samples=16, min_correct=4, give_up_after=8, pass_rate=(0.2, 0.8))


@pytest.mark.parametrize(
    ("correct", "judged", "asked", "more"),
    [
        (0, 4, 4, True),  # nothing yet, not given up yet
        (0, 8, 8, False),  # hopeless
        (0, 0, 4, True),  # nothing could be judged
        (0, 0, 8, False),
        (1, 4, 4, True),  # a quarter: worth it
        (3, 8, 8, True),
        (1, 8, 8, False),  # an eighth: below the bounds
        (3, 3, 4, False),  # all of those that were judged: above the bounds
        (4, 8, 8, False),  # enough
        (3, 12, 12, True),
        (3, 15, 16, False),  # the most
    ],
)
def test_the_rule(correct: int, judged: int, asked: int, more: bool) -> None:
    assert wants_more(POLICY, correct=correct, judged=judged, asked=asked) == more


@given(st.lists(st.booleans(), min_size=64, max_size=64), st.integers(1, 5), st.integers(1, 8), st.integers(1, 16))
def test_rounds_end_and_never_pass_the_most(
    answers: list[bool], num_samples: int, min_correct: int, give_up_after: int
) -> None:
    policy = AdaptiveSampling(max_samples=16, min_correct=min_correct, give_up_after=give_up_after)
    asked = min(num_samples, 16)
    while wants_more(policy, correct=sum(answers[:asked]), judged=asked, asked=asked):
        asked = min(asked + num_samples, 16)
    correct = sum(answers[:asked])
    assert asked <= 16
    assert asked == 16 or correct >= min_correct or (correct == 0 and asked >= give_up_after)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_samples": 20, "adaptive": {}}, r"r: adaptive\.max_samples: must be at least num_samples 20, got 16"),
        ({"adaptive": {"pass_rate": [0.9, 0.1]}}, "r: adaptive: .*pass_rate: must be two shares"),
        ({"adaptive": {"min_corect": 1}}, r"r: adaptive\.min_corect: unknown key; did you mean 'min_correct'"),
        ({"part": "5/4"}, "r: part: must be one of 1/n to n/n, got 5/4"),
        ({"part": "0/4"}, "r: part: must be of the form"),
    ],
)
def test_what_cannot_be_is_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(GenerateConfig, tree, where="r")
