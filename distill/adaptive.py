"""Adaptive numbers of samples: a problem gets enough correct ones, and no money where there is nothing to learn.

Samples are asked for in rounds, and after each whole round one rule decides whether a problem gets another. It looks at
counts over complete rounds alone, never at what arrived first, so that a run that was killed decides as one that was
not.
"""

from __future__ import annotations

from distill.recipe import AdaptiveSampling
from distill.records import VerdictState

JUDGED: frozenset[VerdictState] = frozenset({"correct", "wrong", "truncated"})


def wants_more(policy: AdaptiveSampling, *, correct: int, judged: int, asked: int) -> bool:
    """Tell whether a problem gets another round after `asked` samples, of which `judged` got a verdict on the model.

    Time-outs and failures of ours, and answers that cannot be verified, say nothing of the model: they are in `asked`
    alone.
    """
    if asked >= policy.max_samples or correct >= policy.min_correct:
        return False
    if correct == 0:
        return asked < policy.give_up_after
    low, high = policy.pass_rate
    return low <= correct / judged <= high
