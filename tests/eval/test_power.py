from __future__ import annotations

import numpy as np
import pytest

from eval.power import Expected, smallest_difference, smallest_difference_measured
from eval.statistics import paired_difference


def test_by_hand():
    """omega^2 = 1/9 and no sampling noise: 969 questions show 3 points (7.849 / 9 / 0.03^2)."""
    many_samples = 10**9
    assert smallest_difference(969, many_samples, Expected(0.5, 2 / 3, 2 / 3)) == pytest.approx(0.03, abs=1e-4)
    assert smallest_difference(30, 1) > smallest_difference(30, 64) > smallest_difference(1_319, 64)
    assert smallest_difference(1, 1) == 1.0


def test_what_is_promised_is_found_four_times_in_five():
    """Two models whose chances part by just that: 0.8, within three standard errors of 400 evaluations."""
    rng = np.random.default_rng(8)
    num_questions, k, found, errors = 300, 4, 0, []
    expected = Expected(
        0.5, between_questions=0.2, correlation=1.0
    )  # of chances in [0.2, 0.8], the same but for a shift
    gain = smallest_difference(num_questions, k, expected)
    spread = np.sqrt(0.2 * 0.25)
    for _ in range(400):
        chances = 0.5 + spread * rng.choice([-1, 1], num_questions)
        a, b = (rng.binomial(k, chances + shift) / k for shift in (gain / 2, -gain / 2))
        got = paired_difference(*(dict(enumerate(side.tolist())) for side in (a, b)), samples_each=(k, k))
        found += got.clear and got.value > 0
        errors.append(got)
    assert found / 400 == pytest.approx(0.8, abs=0.06)
    assert smallest_difference_measured(errors) == pytest.approx(gain, rel=0.05), "the spread measured says the same"
    assert smallest_difference_measured([]) is None
