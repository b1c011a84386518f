from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from eval.statistics import (
    consensus,
    paired_difference,
    pass_at_1,
    student_quantile,
)


def test_hand_worked_example():
    """Three questions, two samples each: means 1, 1/2, 0; sd 1/2; stderr 1/(2 sqrt 3); t(2) = 4.3027."""
    got = pass_at_1([[True, True], [True, False], [False, False]])
    assert got.value == pytest.approx(0.5)
    assert got.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert got.ci95 == (0.0, 1.0)  # 0.5 +- 1.24, clipped
    assert (got.num_questions, got.num_samples) == (3, 6)


def test_known_figures():
    """Thirty questions at one half: 9 points of standard error; 500 at 80%: 1.8."""
    aime = pass_at_1([[True]] * 15 + [[False]] * 15)
    assert aime.stderr == pytest.approx(0.0928, abs=1e-4)
    math500 = pass_at_1([[True]] * 400 + [[False]] * 100)
    assert math500.stderr == pytest.approx(0.0179, abs=1e-4)


# Two-sided 95% column of the usual table.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 29: 2.0452, 120: 1.9799}


@pytest.mark.parametrize("degrees", TABLE)
def test_student_quantiles(degrees):
    assert student_quantile(degrees) == pytest.approx(TABLE[degrees], rel=1.5e-3 if degrees == 3 else 3e-4)


def test_all_right_is_not_certainty():
    low, high = pass_at_1([[True, True]] * 30).ci95
    assert 0.85 < low < 0.90
    assert high == 1.0
    assert pass_at_1([[False]] * 30).ci95 == pytest.approx((1 - high, 1 - low))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=12))
def test_pass_at_1_does_not_depend_on_order(outcomes):
    got = pass_at_1(outcomes)
    again = pass_at_1([samples[::-1] for samples in reversed(outcomes)])
    assert again.value == pytest.approx(got.value)
    assert again.stderr == pytest.approx(got.stderr)
    assert got.ci95[0] <= got.value + 1e-12
    assert got.value <= got.ci95[1] + 1e-12


@pytest.mark.parametrize("outcomes", [[], [[]], [[True], []]])
def test_nothing_to_average_is_an_error(outcomes):
    with pytest.raises(ValueError, match="at least one question"):
        pass_at_1(outcomes)


def test_intervals_cover():
    """2,000 evaluations, questions of differing difficulty: the clustered interval holds, the pooled one does not."""
    rng = random.Random(3)
    clustered = pooled = 0
    runs, questions, samples = 2_000, 60, 8
    for _ in range(runs):
        difficulty = [rng.betavariate(0.7, 0.7) for _ in range(questions)]  # mean one half
        outcomes = [[rng.random() < p for _ in range(samples)] for p in difficulty]
        got = pass_at_1(outcomes)
        clustered += got.ci95[0] <= 0.5 <= got.ci95[1]
        naive = 1.96 * math.sqrt(got.value * (1 - got.value) / (questions * samples))
        pooled += abs(got.value - 0.5) <= naive
    # Three standard errors of a 95% share over 2,000 runs are 1.5 points.
    assert abs(clustered / runs - 0.95) < 0.015
    assert pooled / runs < 0.75


def test_paired_difference_by_hand():
    a = {"p": 1.0, "q": 0.5, "r": 1.0, "only a": 0.0}
    b = {"p": 0.5, "q": 0.0, "r": 1.0, "only b": 1.0}
    got = paired_difference(a, b)
    assert got.num_questions == 3
    assert got.value == pytest.approx(1 / 3)
    assert got.stderr == pytest.approx(math.sqrt(((1 / 6) ** 2 * 2 + (1 / 3) ** 2) / 2 / 3))
    assert not got.clear


def test_pairing_sees_what_separate_intervals_hide():
    rng = random.Random(4)
    hard = {str(q): rng.random() for q in range(200)}
    a = {q: [rng.random() < p for _ in range(16)] for q, p in hard.items()}
    b = {q: [rng.random() < max(0.0, p - 0.05) for _ in range(16)] for q, p in hard.items()}
    means_a, means_b = ({q: sum(right) / 16 for q, right in of.items()} for of in (a, b))
    paired = paired_difference(means_a, means_b)
    apart_a, apart_b = pass_at_1(list(a.values())), pass_at_1(list(b.values()))
    assert paired.clear
    assert paired.value > 0
    assert apart_b.ci95[1] > apart_a.ci95[0], "the separate intervals overlap"
    assert paired_difference(means_b, means_a).value == pytest.approx(-paired.value)


def test_no_shared_question_is_an_error():
    with pytest.raises(ValueError, match="both models"):
        paired_difference({"p": 1.0}, {"q": 1.0})


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ([("4", True), ("4", True), ("5", False)], 1.0),
        ([("4", True), ("5", False), ("5", False)], 0.0),
        ([("4", True), ("5", False)], 0.5),
        ([("4", True), ("5", False), ("6", False)], pytest.approx(1 / 3)),
        ([(None, False), (None, False), (" 4 ", True)], 1.0),
        ([(None, False)], 0.0),
    ],
)
def test_consensus(answers, score):
    assert consensus(answers) == score
