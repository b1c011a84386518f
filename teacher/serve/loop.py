"""An engine that is fed while it runs: requests join the batch as they come.

An engine's run draws with one set of settings. Jobs with the same ones join the run under way as soon as slots are
free; the first with others waits, and everything behind it, until the run has drained.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from teacher.serve.engine import Draw, Engine
from teacher.serve.sequence import Key, Sequence

# A first job waits this long for company, so that what is sent together is read in one prefill.
LINGER_S = 0.01


@dataclass(frozen=True)
class Job(Generic[Key]):
    sequence: Sequence[Key]
    draw: Draw


class EngineLoop(Generic[Key]):
    """Takes jobs from a queue until None comes, calls `done` with every finished sequence, in the caller's thread."""

    def __init__(
        self,
        engine: Engine,
        jobs: queue.SimpleQueue[Job[Key] | None],
        done: Callable[[Sequence[Key]], object],
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._done = done
        self._held: Job[Key] | None = None
        self._closing = False

    def run(self) -> None:
        while (job := self._held or self._next()) is not None:
            self._held, draw = None, job.draw
            first = [job.sequence, *self._company(draw)]
            for sequence in self._engine.run(first, **draw.as_arguments(), more=lambda d=draw: self._joining(d)):
                self._done(sequence)

    def _next(self) -> Job[Key] | None:
        return None if self._closing else self._jobs.get()

    def _company(self, draw: Draw) -> list[Sequence[Key]]:
        """What else has come once nothing has for a moment, up to a batch."""
        company: list[Sequence[Key]] = []
        quiet_since = time.monotonic()
        while len(company) < self._engine.batch_size and time.monotonic() - quiet_since < LINGER_S:
            if joining := self._joining(draw):
                company += joining
                quiet_since = time.monotonic()
            elif self._held is not None or self._closing:
                break
            else:
                time.sleep(LINGER_S / 10)
        return company

    def _joining(self, draw: Draw) -> list[Sequence[Key]]:
        joining: list[Sequence[Key]] = []
        while self._held is None and not self._closing:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._closing = True
            elif job.draw == draw:
                joining.append(job.sequence)
            else:
                self._held = job
        return joining
