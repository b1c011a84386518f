"""Statistics of scores: means over questions, errors clustered by question, paired differences, cons@k.

A question is the unit that was drawn at random; samples of one question are repeats of the same draw. So the mean of
each question's samples is one observation, and the standard error is that of a mean over questions ("Adding Error Bars
to Evals", arXiv 2411.00640 s.2.2: clustered standard errors; s.4.2: paired differences). Pooling the samples instead
understates the error whenever questions differ in difficulty.

Intervals are Student-t over questions, clipped to what is possible. Where all questions agree (every sample right, or
every one wrong) the observed spread is zero and a t interval would claim certainty; there Wilson's score interval over
questions is given instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from distill.intervals import LEVEL, Z95, wilson


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, 95% interval and what it rests on."""

    value: float
    stderr: float
    ci95: tuple[float, float]
    num_questions: int
    num_samples: int


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over the questions that both answered."""

    value: float
    stderr: float
    ci95: tuple[float, float]
    num_questions: int

    @property
    def clear(self) -> bool:
        """The interval leaves zero out."""
        return not self.ci95[0] <= 0 <= self.ci95[1]


def pass_at_1(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """Mean over questions of the mean over samples; `outcomes[q]` are the graded samples of question q (>= 1 each).

    Raises ValueError where there is no question or one without samples.
    """
    if not outcomes or not all(outcomes):
        raise ValueError("pass@1 needs at least one question, and a sample of each")
    return mean_estimate([fmean(samples) for samples in outcomes], sum(map(len, outcomes)))


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> Difference:
    """Difference of two models' pass@1 over the questions that both have samples of.

    `a` and `b` give each question's id the mean over its samples, in [0, 1]. What makes a question hard for both
    cancels, so the interval is narrower than two separate ones suggest. Raises ValueError where no question is shared.
    """
    shared = [question for question in a if question in b]
    if not shared:
        raise ValueError("no question was answered by both models")
    value, stderr = _mean_and_stderr([a[question] - b[question] for question in shared])
    return Difference(value, stderr, _student(value, stderr, len(shared), -1.0, 1.0), len(shared))


def consensus(answers: Sequence[tuple[str | None, bool]]) -> float:
    """cons@k of one question: whether the most frequent answer is right.

    `answers` are (extracted answer, graded correct). Samples without an answer do not vote. Equally frequent answers
    share the vote: the score is the share of them that is right, the mean over fair tie-breaks.
    """
    votes: Counter[str] = Counter()
    right: dict[str, bool] = {}
    for answer, correct in answers:
        if answer is not None:
            key = " ".join(answer.split())
            votes[key] += 1
            right[key] = right.get(key, False) or correct
    if not votes:
        return 0.0
    top = max(votes.values())
    return fmean(right[key] for key, count in votes.items() if count == top)


def mean_estimate(values: Sequence[float], num_samples: int) -> Estimate:
    """Estimate for a metric in [0, 1] with one value a question; `num_samples` is what the values rest on."""
    value, stderr = _mean_and_stderr(values)
    degenerate = stderr == 0 and value in (0.0, 1.0)
    interval = (
        wilson(round(value) * len(values), len(values))
        if degenerate
        else _student(value, stderr, len(values), 0.0, 1.0)
    )
    return Estimate(value, stderr, interval, len(values), num_samples)


def student_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t: exact for 1 and 2 degrees of freedom, else the Cornish-Fisher expansion.

    Abramowitz and Stegun 26.7.5 to the fourth order: within 0.15% at 3 degrees, 0.01% from 6 on.
    """
    if degrees < 1:
        raise ValueError(f"needs at least one degree of freedom, got {degrees}")
    if degrees == 1:
        return math.tan(math.pi * LEVEL / 2)
    if degrees == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**order for order, term in enumerate(terms, start=1))


def _mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _student(value: float, stderr: float, count: int, low: float, high: float) -> tuple[float, float]:
    if count < 2:  # one question says nothing of the others
        return (low, high)
    half = student_quantile(count - 1) * stderr
    return (max(low, value - half), min(high, value + half))
