from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import bootstrap as scipy_bootstrap

from benchmarks.coverage import called_different, coverage, families_with_a_rejection
from eval.bootstrap import bootstrap_interval
from eval.statistics import (
    Difference,
    consensus,
    holm,
    mean_estimate,
    paired_difference,
    pass_at_1,
)


def test_hand_worked_example():
    """Three questions, two samples each: means 1, 1/2, 0; sd 1/2; stderr 1/(2 sqrt 3); t(2) = 4.3027."""
    got = pass_at_1([[True, True], [True, False], [False, False]])
    assert got.value == pytest.approx(0.5)
    assert got.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert got.ci95 == pytest.approx((0.0362, 0.9638), abs=1e-4)  # Wilson's of 3 (1.96 / 4.3027)^2 = 0.6225 questions
    assert (got.num_questions, got.num_samples) == (3, 6)


def test_known_figures():
    """Thirty questions at one half: 9 points of standard error; 500 at 80%: 1.8."""
    aime = pass_at_1([[True]] * 15 + [[False]] * 15)
    assert aime.stderr == pytest.approx(0.0928, abs=1e-4)
    math500 = pass_at_1([[True]] * 400 + [[False]] * 100)
    assert math500.stderr == pytest.approx(0.0179, abs=1e-4)


def test_agreement_by_luck_is_not_certainty():
    low, high = pass_at_1([[True, True]] * 30).ci95
    assert 0.85 < low < 0.90
    assert high == pytest.approx(1.0)
    assert pass_at_1([[False]] * 30).ci95 == pytest.approx((0.0, 0.1135), abs=1e-4), "Wilson's"
    low, high = pass_at_1([[True, False]] * 3).ci95
    assert low < 0.2 < 0.8 < high, "three questions, all half right"
    same = {str(q): float(q % 2) for q in range(30)}
    low, high = paired_difference(same, same).ci95
    assert low == pytest.approx(-high)
    assert 0.05 < high < 0.12, "a difference on one question in twenty goes unseen in 30"
    two = paired_difference({"p": 0.5, "q": 0.75}, {"p": 0.25, "q": 0.5}, (4, 4))
    assert two.value == 0.25
    assert two.holds_zero, "two questions with one difference"
    assert paired_difference({"p": 1.0}, {"p": 0.0}).ci95 == (-1.0, 1.0)


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
    """Four regimes of 100 evaluations together: three standard errors of a 95% share of 400 are 3.3 points."""
    rows = [*coverage(100, sizes=(30, 200), samples=(16,), rates=(0.3, 0.5))]
    for name in ("mean", "paired_no_gain", "paired_gain"):
        assert sum(row[name] for row in rows) / len(rows) == pytest.approx(95, abs=3.3), (name, rows)


def test_one_sample_of_thirty_questions_covers():
    """Exactly, over all outcomes: binomial chances of every number right."""
    intervals = [mean_estimate([1.0] * right + [0.0] * (30 - right), 30).ci95 for right in range(31)]
    for rate in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        chances = [math.comb(30, right) * rate**right * (1 - rate) ** (30 - right) for right in range(31)]
        held = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= rate <= high)
        assert 0.93 <= round(held, 3) <= 0.975, rate


@pytest.mark.slow
def test_a_thousand_intervals_cover():
    for row in coverage(1_000, sizes=(30, 200), samples=(1, 16), rates=(0.3, 0.5)):
        for name in ("mean", "paired_no_gain", "paired_gain"):
            assert 92 <= row[name] <= 98, f"93 to 97, and a standard error of 0.7 more: {row}"


def test_pooling_samples_understates_the_error():
    rng = np.random.default_rng(3)
    clustered = pooled = 0
    for _ in range(500):
        values = rng.binomial(8, rng.beta(0.7, 0.7, 60)) / 8  # mean one half
        got = mean_estimate(values.tolist(), 480)
        clustered += got.ci95[0] <= 0.5 <= got.ci95[1]
        pooled += abs(got.value - 0.5) <= 1.96 * math.sqrt(got.value * (1 - got.value) / 480)
    assert clustered / 500 > 0.92
    assert pooled / 500 < 0.75


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is():
    for size, samples in ((30, 1), (30, 16), (200, 4)):
        assert called_different(2_000, size, samples)["percent"] <= 6
        assert families_with_a_rejection(2_000, size, samples)["percent"] <= 6


def test_holm_by_hand():
    """Holm 1979: 0.01 x 4, 0.02 x 3, 0.03 x 2 no lower than what came before, 0.5 x 1."""
    family = [Difference(0.1, 0.05, (0.0, 0.2), 50, p, p) for p in (0.03, 0.01, 0.5, 0.02)]
    assert [one.adjusted_p for one in holm(family)] == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert [one.clear for one in holm(family)] == [False, True, False, False]
    assert holm([]) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_the_p_value_and_the_interval_agree(rights):
    a, b = ({q: right[side] / 4 for q, right in enumerate(rights)} for side in (0, 1))
    got = paired_difference(a, b, (4, 4))
    assert got.holds_zero == (got.p_value >= 0.05)
    assert 0 <= got.p_value <= 1
    back = paired_difference(b, a, (4, 4))
    assert back.ci95 == pytest.approx((-got.ci95[1], -got.ci95[0]))
    assert back.p_value == pytest.approx(got.p_value)


def test_the_bootstrap_agrees_where_questions_are_many_and_knows_skew():
    rng = np.random.default_rng(5)
    values = (rng.binomial(4, rng.beta(2, 1, 800)) / 4).tolist()
    analytic = mean_estimate(values, 3_200)
    assert bootstrap_interval(values) == pytest.approx(analytic.ci95, abs=0.15 * analytic.stderr)
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1]), "seeded, whatever the order"
    theirs = scipy_bootstrap((np.array(values),), np.mean, n_resamples=4_000, method="BCa", batch=200, rng=1)
    assert bootstrap_interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=0.15 * analytic.stderr)
    few = [1.0] * 3 + [0.0] * 27
    low, high = bootstrap_interval(few)
    assert high - 0.1 > 0.1 - low, "few are right: the upper side is longer"
    assert bootstrap_interval([0.5] * 30) is None


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
