"""How accuracy grows with size: a line in log-odds over the logarithm of parameters, fitted through distilled students.

Scores are weighted by their intervals. Students differ by more than their questions (architecture, luck of a training),
so errors are widened until the line fits them (Birge's ratio, as the Particle Data Group does), and intervals are those
of a further student, by Student's t. Where training tokens differ, and students are more than the terms, their
logarithm is a second term. What it expects beyond the largest student is extrapolated, and called so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.intervals import LEVEL, Z95
from distill.records import ScoreCard
from eval.compare import SuiteComparison
from eval.training_curves import Curve

MIN_SIZES = 3
FURTHER = (2, 10)  # times the largest student: where a fit says what to expect


@dataclass(frozen=True)
class Prediction:
    """pass@1 to be expected of a student of so many parameters, trained on as many tokens as the largest one was."""

    num_parameters: int
    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class SizeFit:
    """`per_tenfold` is in log-odds for ten times the parameters, `per_tenfold_tokens` for ten times the tokens; that is
    None where the students saw about as many."""

    num_students: int
    smallest: int
    largest: int
    per_tenfold: float
    per_tenfold_ci95: tuple[float, float]
    per_tenfold_tokens: float | None
    extrapolated: tuple[Prediction, ...]

    def __str__(self) -> str:
        low, high = self.per_tenfold_ci95
        said = [
            f"{100 * one.value:.0f}% ({100 * one.ci95[0]:.0f} to {100 * one.ci95[1]:.0f}) at {one.num_parameters:,} "
            "parameters"
            for one in self.extrapolated
        ]
        return (
            f"A line through {self.num_students} distilled students rises by {self.per_tenfold:.2f} in log-odds for "
            f"ten times the parameters (95% interval {low:.2f} to {high:.2f}). Extrapolated, it expects of a further "
            f"student {' and '.join(said)}."
        )


def size_fit(suite: SuiteComparison, curves: Sequence[Curve]) -> SizeFit | None:
    """The line through the distilled students of one suite and one run; None where they have fewer than three sizes."""
    models = suite.of_role("distilled")
    cards = [card for model in models if (card := model.card(suite.name)) is not None]
    sizes = np.array([card.num_parameters for card in cards], dtype=float)
    if len(set(sizes)) < MIN_SIZES or len({model.run for model in models}) > 1:
        return None
    odds = np.array([_log_odds(card.value, card.num_questions) for card in cards])
    errors = np.array([_width(card) / (2 * Z95) for card in cards])
    tokens = _tokens([card.name for card in cards], curves)
    terms = [np.ones_like(sizes), np.log10(sizes)]
    if tokens is not None and len(cards) > len(terms) + 1:
        terms.append(np.log10(tokens))
    line = _Line(np.stack(terms, axis=1), odds, errors)
    at_largest = terms[2][int(sizes.argmax())] if len(terms) > 2 else None
    largest = int(sizes.max())
    return SizeFit(
        num_students=len(cards),
        smallest=int(sizes.min()),
        largest=largest,
        per_tenfold=float(line.slopes[1]),
        per_tenfold_ci95=line.interval(1),
        per_tenfold_tokens=float(line.slopes[2]) if len(terms) > 2 else None,
        extrapolated=tuple(_prediction(line, times * largest, at_largest) for times in FURTHER),
    )


class _Line:
    """Weighted least squares. `terms` is [students, terms], `values` and `errors` are [students]."""

    def __init__(self, terms: np.ndarray, values: np.ndarray, errors: np.ndarray) -> None:
        from scipy import stats

        scaled = terms / errors[:, None]
        self.slopes, *_ = np.linalg.lstsq(scaled, values / errors, rcond=None)
        freedom = len(values) - terms.shape[1]
        misfit = float(np.sum(((values - terms @ self.slopes) / errors) ** 2)) / freedom
        self._widened = max(1.0, misfit)
        self._covariance = np.linalg.pinv(scaled.T @ scaled) * self._widened
        # What students differ by beyond their questions, of a further one too.
        self._own = (self._widened - 1) * float(np.mean(errors**2))
        self._quantile = float(stats.t.ppf(0.5 + LEVEL / 2, freedom))

    def interval(self, term: int) -> tuple[float, float]:
        half = self._quantile * math.sqrt(self._covariance[term, term])
        return float(self.slopes[term]) - half, float(self.slopes[term]) + half

    def expected(self, terms: np.ndarray) -> tuple[float, float, float]:
        """Of a further student: log-odds, and their interval."""
        middle = float(terms @ self.slopes)
        half = self._quantile * math.sqrt(float(terms @ self._covariance @ terms) + self._own)
        return middle, middle - half, middle + half


def _prediction(line: _Line, num_parameters: int, log_tokens: float | None) -> Prediction:
    terms = [1.0, math.log10(num_parameters), *([] if log_tokens is None else [log_tokens])]
    value, low, high = (_share(odds) for odds in line.expected(np.array(terms)))
    return Prediction(num_parameters, value, (low, high))


def _width(card: ScoreCard) -> float:
    """Of the interval, in log-odds."""
    assert card.ci95 is not None, "pass@1 has one"
    low, high = (_log_odds(bound, card.num_questions) for bound in card.ci95)
    return high - low


def _log_odds(share: float, num_questions: int) -> float:
    """Kept from infinity by a quarter of a question."""
    least = 0.25 / num_questions
    share = min(max(share, least), 1 - least)
    return math.log(share / (1 - share))


def _share(log_odds: float) -> float:
    """Without overflow, however wide an interval is."""
    return 0.5 * (1 + math.tanh(log_odds / 2))


def _tokens(names: Sequence[str], curves: Sequence[Curve]) -> np.ndarray | None:
    """Tokens that each learned from; None where one is not known, or all saw as many but for a tenth."""
    learned = {curve.name: curve.num_tokens for curve in curves}
    found = [learned.get(name, 0) for name in names]
    if min(found) <= 0 or max(found) < 1.1 * min(found):
        return None
    return np.array(found, dtype=float)
