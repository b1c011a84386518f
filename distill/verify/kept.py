"""Verdicts that are kept: what the ledger knows is not graded again, what it does not is put there as it is made.

Grading can be slow (programs that run for seconds, a judge that is a model itself), so a stop must not lose it. A
verdict is found again by the sample's key and a hash of all that can change it: the text, what the grader asks of the
problem, the graders' versions and settings.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from distill.ledger import Ledger
from distill.protocols import Teacher, Verifier
from distill.recipe import VerifyConfig
from distill.records import Problem, Trace, Verdict, content_id
from distill.verify.judge import judge_settings

# Part of every verdict's key. Raise it when the same answer would get another verdict from our own code.
GRADING_VERSION = 3
GRADERS = ("latex2sympy2-extended", "math-verify", "mpmath", "reasoning-gym", "sympy")
AFTERWARDS = {"relabel", "suspect_min_samples", "suspect_min_share"}  # what is made of verdicts that are there
FLUSH_VERDICTS = 256
FLUSH_S = 1.0


def grading_settings(config: VerifyConfig, judge: Teacher | None = None) -> dict[str, Any]:
    """Settings that every verdict depends on: the graders' versions and settings, not how many grade at once.

    With `judge`, the model that `config.judge` names, its identity too.
    """
    versions = {name: importlib.metadata.version(name) for name in GRADERS}
    versions["python"] = "{}.{}".format(*sys.version_info)  # runs the programs that are graded
    settings: dict[str, Any] = {
        **config.model_dump(mode="json", exclude={"num_workers", "judge", *AFTERWARDS}),
        "grader_versions": {"potstill": str(GRADING_VERSION), **versions},
    }
    if config.judge is not None:
        settings["judge"] = judge_settings(config.judge, judge)
        if judge is None:
            settings["judge"]["teacher"] = config.judge.teacher.identity()
    return settings


class KeptVerdicts:
    """Grades with `verifier` and keeps every verdict in `ledger`; owns neither. The block's end stores what is left."""

    def __init__(self, ledger: Ledger, verifier: Verifier, settings: Mapping[str, Any]) -> None:
        self.found = 0  # verdicts that were there
        self._ledger = ledger
        self.verifier = verifier
        self._settings = settings
        self._waiting: list[tuple[str, str, Verdict]] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def grade(self, answers: Sequence[tuple[Problem, Trace]]) -> Iterator[Verdict]:
        """Yield one verdict an answer, in order."""
        pairs = [(trace.key, grading_id(self._settings, problem, trace)) for problem, trace in answers]
        known = self._ledger.verdicts(pairs)
        self.found += len(known)
        fresh = [answer for answer, pair in zip(answers, pairs, strict=True) if pair[0] not in known]
        made = self.verifier.verify([(problem, trace.text, trace.finish_reason) for problem, trace in fresh])
        for key, grading in pairs:
            if key in known:
                yield known[key]
                continue
            verdict = next(made)
            self._waiting.append((key, grading, verdict))
            if len(self._waiting) >= FLUSH_VERDICTS or time.monotonic() - self._flushed > FLUSH_S:
                self._flush()
            yield verdict

    def _flush(self) -> None:
        self._ledger.add_verdicts(self._waiting)
        self._waiting, self._flushed = [], time.monotonic()


def grading_id(settings: Mapping[str, Any], problem: Problem, trace: Trace) -> str:
    """The second half of a verdict's key: hash of all that can change it, given the sample's key."""
    return content_id([settings, problem.grader, problem.answer, problem.metadata, trace.text, trace.finish_reason])
