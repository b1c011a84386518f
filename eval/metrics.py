"""Metrics of a question's samples beside their mean, and of one answer beside its verdict."""

from __future__ import annotations

from math import comb

from distill.verify.language import words_in_other_scripts

MIXED_SHARE = 0.01  # of an answer's words, in a script that its question does not use, from which it counts as mixed


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The odds that one of `k` samples is right, without bias, from `num_samples` >= k of which some are right.

    Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1: 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples are right: no pass@{k} of that")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def ks(num_samples: int) -> list[int]:
    """The powers of two up to `num_samples`, from 2: the k of pass@k beside pass@1."""
    return [1 << power for power in range(1, num_samples.bit_length())]


def mixes_scripts(question: str, text: str) -> bool | None:
    """Does the answer, its reasoning included, leave the question's script? None where there are no words to compare.

    Latin for a Chinese question, Chinese for an English one. Mathematics, code and single letters are no words
    (`distill.verify.language`); a question that is in two scripts allows both.
    """
    share = words_in_other_scripts(text, question)
    return None if share is None else share > MIXED_SHARE
