"""Answers to verdicts, by rule or, on request, by a judge. Filters, rewards and evaluation grade with this same code.

`open_verifier` gives a `Verifier` for the length of a block; `extract_answer` finds what a completion answers. All that
evaluates, parses or otherwise works on a model's text does so in worker processes that are killed when they hang.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill.protocols import Teacher, Verifier
from distill.recipe import VerifyConfig
from distill.verify.extract import extract_answer
from distill.verify.judge import JudgingVerifier
from distill.verify.verifier import RuleVerifier

__all__ = ["extract_answer", "open_verifier"]


@contextmanager
def open_verifier(config: VerifyConfig, *, judge: Teacher | None = None) -> Iterator[Verifier]:
    """A verifier whose workers start with the first answer that needs one and end with the block.

    `judge` is the model of `config.judge`, opened and closed by the caller; without it, what needs one is unverifiable.
    """
    rules = RuleVerifier(config)
    try:
        if judge is None or config.judge is None:
            yield rules
        else:
            yield JudgingVerifier(rules, judge, config.judge)
    finally:
        rules.close()
