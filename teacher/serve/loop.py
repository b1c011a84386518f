"""An engine that is fed while it runs: sequences join the batch as they come, and leave it when nobody wants them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from teacher.serve.engine import Engine
from teacher.serve.sequence import Key, Sequence


@dataclass(frozen=True)
class Withdrawn(Generic[Key]):
    """The sequence with this key is no longer wanted."""

    key: Key


class EngineLoop(Generic[Key]):
    """Takes jobs from a queue until None comes, calls `done` with every finished sequence, in the caller's thread."""

    def __init__(
        self,
        engine: Engine,
        jobs: queue.SimpleQueue[Sequence[Key] | Withdrawn[Key] | None],
        done: Callable[[Sequence[Key]], object],
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._done = done
        self._closing = False

    def run(self) -> None:
        while not self._closing:
            first: list[Sequence[Key]] = []
            self._take(self._jobs.get(), first)
            for sequence in self._engine.run(first, more=self._joining):
                self._done(sequence)

    def _joining(self) -> list[Sequence[Key]]:
        joining: list[Sequence[Key]] = []
        while not self._closing:
            try:
                self._take(self._jobs.get_nowait(), joining)
            except queue.Empty:
                break
        return joining

    def _take(self, job: Sequence[Key] | Withdrawn[Key] | None, joining: list[Sequence[Key]]) -> None:
        if job is None:
            self._closing = True
        elif isinstance(job, Withdrawn):
            self._engine.cancel(job.key)
            joining[:] = [sequence for sequence in joining if sequence.key != job.key]
        else:
            joining.append(job)
