"""The smallest difference that a set of questions can show: before a run by assumption, after it as measured.

"Adding Error Bars to Evals", arXiv 2411.00640 s.5: a true difference d is found with power 1 - beta at level alpha if

    d = (z_{alpha/2} + z_beta) sqrt((omega^2 + sigma_a^2/k_a + sigma_b^2/k_b) / n)

with n questions and k samples of each; omega^2 is the variance over questions of the difference of the two models'
chances, sigma^2 the mean variance of one sample about its question's chance. For one comparison: Holm's adjustment of
several asks for more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from distill.intervals import Z95
from eval.statistics import Difference

POWER = 0.8
REACH = Z95 + NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Expected:
    """What is assumed of two models before anything is measured.

    A sample is right with `accuracy` on average, which makes its variance accuracy(1 - accuracy); `between_questions`
    is the share of it that lies between questions, `correlation` that of both models' chances over questions.
    """

    accuracy: float = 0.5
    between_questions: float = 0.5
    correlation: float = 0.5


def smallest_difference(num_questions: int, num_samples: int, expected: Expected = Expected()) -> float:
    """The smallest difference of pass@1, in [0, 1], that is found four times in five at the 5% level."""
    of_a_sample = expected.accuracy * (1 - expected.accuracy)
    omega2 = 2 * of_a_sample * expected.between_questions * (1 - expected.correlation)
    sigma2 = of_a_sample * (1 - expected.between_questions)
    return min(1.0, REACH * math.sqrt((omega2 + 2 * sigma2 / num_samples) / num_questions))


def smallest_difference_measured(differences: Sequence[Difference]) -> float | None:
    """The same by the standard errors that these comparisons of one suite had: their median; None without any."""
    errors = [difference.stderr for difference in differences]
    return min(1.0, REACH * median(errors)) if errors else None
