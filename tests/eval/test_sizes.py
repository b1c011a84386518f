"""A line through students of known sizes: what it says, how sure it is, and what it refuses to say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.records import ScoreCard
from eval.compare import compare_run
from eval.sizes import size_fit
from eval.statistics import pass_at_1
from eval.training_curves import Curve
from tests.eval.synthetic_run import write_synthetic_run

QUESTIONS = 400


def share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def suite_of(rates: dict[int, float], rng: np.random.Generator) -> Any:
    """A suite on which students of so many parameters have these chances at every question."""
    models = []
    for number, (size, rate) in enumerate(rates.items()):
        right = [[bool(one)] for one in rng.random(QUESTIONS) < rate]
        card = ScoreCard(
            name=f"s{number}-distilled", role="distilled", architecture="qwen2", num_parameters=size,
            num_active_parameters=size, suite="mine", metric="pass@1", **vars(pass_at_1(right)),
        )  # fmt: skip
        models.append(SimpleNamespace(run="", card=lambda suite, card=card: card))
    return SimpleNamespace(name="mine", of_role=lambda role: models)


def test_the_slope_and_a_further_student_are_within_their_intervals() -> None:
    """Of 300 fits through five students: at least nine in ten of each, where nineteen in twenty are promised."""
    rng = np.random.default_rng(5)
    sizes = [10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8]
    truth = {size: share(1.5 * (math.log10(size) - 7)) for size in [*sizes, 2 * 10**8]}
    held = []
    for _ in range(300):
        fit = size_fit(suite_of({size: truth[size] for size in sizes}, rng), [])
        assert fit is not None
        twice = fit.extrapolated[0]
        slope, further = fit.per_tenfold_ci95, twice.ci95
        assert twice.num_parameters == 2 * 10**8
        held.append((slope[0] < 1.5 < slope[1], further[0] < truth[2 * 10**8] < further[1]))
    assert np.mean(held, axis=0).min() > 0.9


def test_students_that_scatter_make_it_less_sure() -> None:
    rng = np.random.default_rng(6)
    sizes = [10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8]
    smooth = size_fit(suite_of({size: share(math.log10(size) - 7) for size in sizes}, rng), [])
    shaken = {size: share(math.log10(size) - 7 + (-1) ** place) for place, size in enumerate(sizes)}
    rough = size_fit(suite_of(shaken, rng), [])
    assert smooth is not None
    assert rough is not None
    widths = [fit.per_tenfold_ci95[1] - fit.per_tenfold_ci95[0] for fit in (smooth, rough)]
    assert widths[1] > 3 * widths[0]


def test_tokens_are_told_apart_from_parameters() -> None:
    """Students whose tokens do not grow with their size: what each of them brings is found again."""
    rng = np.random.default_rng(7)
    tokens = {10**6: 10**8, 3 * 10**6: 10**6, 10**7: 10**7, 3 * 10**7: 10**6, 10**8: 10**8, 2 * 10**8: 10**7}
    rates = {n: share(0.8 * (math.log10(n) - 7) + 0.4 * (math.log10(seen) - 7)) for n, seen in tokens.items()}
    curves = [Curve(f"s{place}-distilled", "distilled", (), 1, seen) for place, seen in enumerate(tokens.values())]
    fit = size_fit(suite_of(rates, rng), curves)
    assert fit is not None
    assert fit.per_tenfold == pytest.approx(0.8, abs=0.3)
    assert fit.per_tenfold_tokens == pytest.approx(0.4, abs=0.2)
    alone = size_fit(suite_of(rates, rng), [])
    assert alone is not None
    assert alone.per_tenfold_tokens is None


def test_all_or_nothing_right_is_no_infinity_and_two_sizes_are_no_line() -> None:
    rng = np.random.default_rng(8)
    fit = size_fit(suite_of({10**6: 0.0, 10**7: 0.5, 10**8: 1.0}, rng), [])
    assert fit is not None
    assert all(0 <= bound <= 1 for one in fit.extrapolated for bound in one.ci95)
    assert size_fit(suite_of({10**6: 0.1, 10**7: 0.5}, rng), []) is None


def test_a_run_says_it(tmp_path) -> None:
    (suite,) = compare_run(write_synthetic_run(tmp_path / "run")).suites
    fit = size_fit(suite, [])
    assert fit is not None
    assert (fit.smallest, fit.largest) == (suite.students[0].num_parameters, suite.students[-1].num_parameters)
    assert str(fit).startswith("A line through 4 distilled students rises by ")
