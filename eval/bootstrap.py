"""The bootstrap over questions: a second opinion on the analytic intervals, which assumes no distribution.

Questions are drawn again with replacement, each with all its samples: the cluster bootstrap. Intervals are BCa, bias
corrected and accelerated (DiCiccio and Efron 1996, eq. 2.2-2.7): few questions and scores near 0 or 1 are skewed, and
plain percentiles ignore that.

`summary.json` has it beside every score and gain of a whole suite. It decides nothing: where all questions agree it has
no width, and with 30 questions it covers less than the analytic interval does (`python -m benchmarks.coverage`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.intervals import Z95

NUM_RESAMPLES = 4_000
SEED = 17


def bootstrap_interval(values: Sequence[float], seed: int = SEED) -> tuple[float, float] | None:
    """The 95% interval of the mean of `values`, one a question; None where they are all equal."""
    from scipy.special import ndtr, ndtri

    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < 2:
        return None
    num_questions = int(counts.sum())
    # How often each distinct value is drawn is all that the mean of a resample depends on.
    drawn = np.random.default_rng(seed).multinomial(num_questions, counts / num_questions, NUM_RESAMPLES)
    means = drawn @ distinct / num_questions
    value = counts @ distinct / num_questions
    below = np.mean(means < value) + np.mean(means == value) / 2
    bias = ndtri(np.clip(below, 1 / NUM_RESAMPLES, 1 - 1 / NUM_RESAMPLES))
    off = distinct - value
    acceleration = (counts @ off**3) / (6 * (counts @ off**2) ** 1.5)
    shifted = bias + np.array([-Z95, Z95])
    low, high = np.quantile(means, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)
