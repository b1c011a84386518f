"""Statistics of scores: means over questions, errors clustered by question, paired differences, Holm, cons@k.

A question is the unit that was drawn at random; samples of one question are repeats of the same draw. So the mean of
each question's samples is one observation, and the standard error is that of a mean over questions ("Adding Error Bars
to Evals", arXiv 2411.00640 s.2.2: clustered standard errors; s.4.2: paired differences). Pooling the samples instead
understates the error whenever questions differ in difficulty.

Neither interval has zero width where questions agree by luck:

- a mean has Wilson's score interval; with several samples a question, the number of questions is replaced by the
  effective number, p(1 - p) over the variance of the mean that was measured (Korn and Graubard 1998), at most the
  number of samples, and scaled for Student's t;
- a difference has a moderated t interval (Smyth 2004, eq. 2-3): its variance over questions is averaged with that of
  `PRIOR_QUESTIONS` questions which two models at one half would answer independently. Its p-value is the level at
  which that interval reaches zero, so that both always agree.

What they cover is simulated by `python -m benchmarks.coverage`: near 95% wherever accuracies lie between a tenth and
nine tenths, with 30 questions too. Below (or above) that 30 questions cannot do better than what it lists: one in
twenty right is one or two questions, and where these are wholly right or wrong the set often holds none of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from distill.intervals import LEVEL, Z95, wilson

PRIOR_QUESTIONS = 3


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
    """Mean of a - b over the questions that both answered; `stderr` is that of what was measured.

    `p_value` is that of no difference, two-sided; `adjusted_p` the same within a family of comparisons (`holm`), equal
    to it where there is one comparison alone; `bootstrap95` is that of `eval.bootstrap`, where one was asked for.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    num_questions: int
    p_value: float
    adjusted_p: float
    bootstrap95: tuple[float, float] | None = None

    @property
    def clear(self) -> bool:
        """Told from zero at the 5% level, all comparisons of its family together."""
        return self.adjusted_p < 1 - LEVEL

    @property
    def holds_zero(self) -> bool:
        """Its own interval, as if it were the only comparison."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def pass_at_1(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """Mean over questions of the mean over samples; `outcomes[q]` are the graded samples of question q (>= 1 each).

    Raises ValueError where there is no question or one without samples.
    """
    if not outcomes or not all(outcomes):
        raise ValueError("pass@1 needs at least one question, and a sample of each")
    return mean_estimate([fmean(samples) for samples in outcomes], sum(map(len, outcomes)))


def mean_estimate(values: Sequence[float], num_samples: int) -> Estimate:
    """Estimate for a metric in [0, 1] with one value a question; `num_samples` is what the values rest on."""
    value, variance_of_mean = float(np.mean(values)), _variance(values) / len(values)
    return Estimate(
        value=value,
        stderr=math.sqrt(variance_of_mean),
        ci95=_score_interval(value, variance_of_mean, len(values), num_samples),
        num_questions=len(values),
        num_samples=num_samples,
    )


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], samples_each: tuple[int, int] = (1, 1)
) -> Difference:
    """Difference of two models' pass@1 over the questions that both have samples of.

    `a` and `b` give each question's id the mean over its samples, in [0, 1]; `samples_each` says how many of a and of b
    a mean rests on. What makes a question hard for both cancels, so the interval is narrower than two separate ones
    suggest. Raises ValueError where no question is shared.
    """
    shared = [question for question in a if question in b]
    if not shared:
        raise ValueError("no question was answered by both models")
    differences = [a[question] - b[question] for question in shared]
    value, count = float(np.mean(differences)), len(shared)
    prior = sum(0.25 / samples for samples in samples_each)  # p(1 - p)/k at p = 1/2
    measured = _variance(differences)
    moderated = ((count - 1) * measured + PRIOR_QUESTIONS * prior) / (count - 1 + PRIOR_QUESTIONS)
    half, p_value = _student_t(value, math.sqrt(moderated / count), count - 1)
    return Difference(
        value=value,
        stderr=math.sqrt(measured / count),
        ci95=(max(-1.0, value - half), min(1.0, value + half)),
        num_questions=count,
        p_value=p_value,
        adjusted_p=p_value,
    )


def holm(family: Sequence[Difference]) -> list[Difference]:
    """The same comparisons with p-values adjusted for their number, by Holm's step-down procedure (1979).

    The chance that any difference of the family is called clear where there is none stays at most 5%, however the
    comparisons depend on each other.
    """
    adjusted = [0.0] * len(family)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(family)), key=lambda place: family[place].p_value)):
        largest = max(largest, min(1.0, (len(family) - rank) * family[place].p_value))
        adjusted[place] = largest
    return [replace(one, adjusted_p=p) for one, p in zip(family, adjusted, strict=True)]


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


def student_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))


def _student_t(value: float, stderr: float, degrees: int) -> tuple[float, float]:
    """Half the width of the 95% interval, and the two-sided p-value of zero."""
    if degrees == 0:  # one question says nothing of the others
        return math.inf, 1.0
    from scipy.special import stdtr

    return student_quantile(degrees) * stderr, 2 * float(stdtr(degrees, -abs(value) / stderr))


def _variance(values: Sequence[float]) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0


def _score_interval(value: float, variance_of_mean: float, num_questions: int, num_samples: int) -> tuple[float, float]:
    if num_questions < 2:  # one question says nothing of the others
        return (0.0, 1.0)
    if num_samples == num_questions:  # right or wrong: the share says all, its variance too
        return wilson(value * num_questions, num_questions)
    effective = float(num_questions)
    if 0 < value < 1:
        # No more than as many independent draws as there are samples: equal questions agree by luck.
        effective = value * (1 - value) / max(variance_of_mean, value * (1 - value) / num_samples)
    effective *= (Z95 / student_quantile(num_questions - 1)) ** 2
    return wilson(value * effective, effective)
