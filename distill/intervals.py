"""Confidence intervals of shares."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL = 0.95
Z95 = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def wilson(num_successes: float, num_trials: float) -> tuple[float, float]:
    """The 95% score interval of a share of independent trials (Wilson 1927); their number may be an effective one."""
    share, z2 = num_successes / num_trials, Z95 * Z95
    centre = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    half = Z95 * spread / (1 + z2 / num_trials)
    return max(0.0, centre - half), min(1.0, centre + half)
