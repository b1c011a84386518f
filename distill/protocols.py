"""The seams where stages meet. Rooms that may not import one another implement and use these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from distill.records import (
    Completion,
    FinishReason,
    Problem,
    Sampling,
    TeacherIdentity,
    TraceRequest,
    Verdict,
)


@runtime_checkable
class Teacher(Protocol):
    """Writes completions. Deterministic for one identity, sampling and request wherever the backend can be."""

    @property
    def identity(self) -> TeacherIdentity: ...

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion a request, each as soon as it is finished, in any order."""
        ...

    def close(self) -> None:
        """Free what the teacher holds: memory, connections, a server it started."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A teacher that can say at any moment, from any thread, how its work stands (requests in flight, cost so far)."""

    def facts(self) -> dict[str, str | float]: ...


@runtime_checkable
class Verifier(Protocol):
    """Grades answers. Used by training filters, rewards and evaluation alike."""

    def verify(self, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        """Yield one verdict an answer, in order. Never raises for what a model wrote."""
        ...

    def close(self) -> None: ...
