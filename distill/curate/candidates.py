"""Candidates for the filters: a graded sample with its text, and what is remembered of it when the text is gone."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import NamedTuple

from distill.problems.split import normalise
from distill.records import FIRST_HINTED, Problem, Record, Trace, Verdict, VerdictState


class GradedTrace(Record):
    """A verdict with the sample that it is about, as `verdicts.parquet` keeps it."""

    key: str
    problem_id: str
    sample_index: int
    state: VerdictState
    extracted: str | None
    detail: str
    relabelled: bool = False

    @property
    def hinted(self) -> bool:
        return self.sample_index >= FIRST_HINTED

    @property
    def verdict(self) -> Verdict:
        return Verdict(state=self.state, extracted=self.extracted, detail=self.detail, relabelled=self.relabelled)


class DroppedTrace(Record):
    """A trace that is no example: which filter said so, and why."""

    key: str
    problem_id: str
    filter: str
    detail: str


class Candidate(NamedTuple):
    """One graded sample as it is read; filters of single samples see it, and then it is let go."""

    problem: Problem
    trace: Trace
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as filters of the whole set remember it: some hundred bytes, however long its text is.

    `position` is the sample's place in the traces, `digest` 16 bytes over question and text.
    """

    position: int
    key: str
    problem_id: str
    sample_index: int
    source: str
    num_tokens: int
    correct: bool
    digest: bytes

    @property
    def precedence(self) -> tuple[int, str]:
        """Rank samples of which only one may stay, the lowest: the input's order decides nothing."""
        return self.sample_index, self.key


def sample_of(candidate: Candidate, position: int) -> Sample:
    """The sample without its text. Questions that differ in spacing, and texts that differ at their ends, are equal."""
    problem, trace, verdict = candidate
    text = f"{normalise(problem.prompt)}\0{trace.text.strip()}"
    return Sample(
        position=position,
        key=trace.key,
        problem_id=sys.intern(trace.problem_id),  # one text for all samples of a problem
        sample_index=trace.sample_index,
        source=problem.source,
        num_tokens=trace.num_tokens,
        correct=verdict.correct,
        digest=hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(),
    )
