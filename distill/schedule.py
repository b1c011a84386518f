"""The learning rate of a run from scratch, as a share of its peak."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, num_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Linear from 0 over `warmup_steps`, then half a cosine from 1 down to `min_ratio` at `num_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
