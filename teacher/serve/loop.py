"""An engine that is fed while it runs: sequences join the batch as they come, and leave it when nobody wants them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple

from teacher.serve.engine import Engine, Lockstep
from teacher.serve.sequence import Key, Logprobs, Sequence

# How often ranks ask each other for work while there is none: a request waits that long at the most to be begun.
IDLE_S = 0.01


@dataclass(frozen=True)
class Cancelled(Generic[Key]):
    """A job that ends another: the sequence with this key is no longer wanted."""

    key: Key


class TokenDelta(NamedTuple, Generic[Key]):
    """Tokens that a streamed sequence has written since it was last told of; its end is told by `done` alone."""

    key: Key
    token_ids: list[int]
    logprobs: list[Logprobs]


class EngineLoop(Generic[Key]):
    """Takes jobs from a queue until None comes, calls `done` with every finished sequence, in the caller's thread.

    `grew` hears after a step of all streamed sequences that have grown in it and go on. With `lockstep`, which is the
    engine's, runs begin and end on all ranks together, and None must come to all of them.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: queue.SimpleQueue[Sequence[Key] | Cancelled[Key] | None],
        done: Callable[[Sequence[Key]], object],
        grew: Callable[[list[TokenDelta[Key]]], object] = lambda _: None,
        lockstep: Lockstep | None = None,
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._done = done
        self._grew = grew
        self._lockstep = lockstep
        self._streamed: dict[Key, tuple[Sequence[Key], int]] = {}  # how many of its tokens have been told
        self._closing = False

    def run(self) -> None:
        while (first := self._first()) is not None:
            for sequence in self._engine.run(first, more=self._joining):
                self._streamed.pop(sequence.key, None)
                self._done(sequence)

    def _first(self) -> list[Sequence[Key]] | None:
        """Sequences that the next run begins with, once there is work, here or on another rank; None at the end."""
        first: list[Sequence[Key]] = []
        if self._lockstep is None:
            if not self._closing:
                self._take(self._jobs.get(), first)
            return None if self._closing else first
        while True:
            if not self._closing:
                with suppress(queue.Empty):
                    self._take(self._jobs.get(timeout=IDLE_S), first)
            most_waiting, all_closing = self._lockstep.wait(len(first), self._closing)
            if most_waiting:
                return first
            if all_closing:
                return None

    def _joining(self) -> list[Sequence[Key]]:
        self._tell()
        joining: list[Sequence[Key]] = []
        while not self._closing:
            try:
                self._take(self._jobs.get_nowait(), joining)
            except queue.Empty:
                break
        return joining

    def _tell(self) -> None:
        news = []
        for key, (sequence, num_told) in self._streamed.items():
            if (length := sequence.num_written) > num_told:
                news.append(TokenDelta(key, sequence.generated_ids[num_told:length], sequence.logprobs[num_told:]))
                self._streamed[key] = sequence, length
        if news:
            self._grew(news)

    def _take(self, job: Sequence[Key] | Cancelled[Key] | None, joining: list[Sequence[Key]]) -> None:
        if job is None:
            self._closing = True
        elif isinstance(job, Cancelled):
            self._engine.cancel(job.key)
            self._streamed.pop(job.key, None)
            joining[:] = [sequence for sequence in joining if sequence.key != job.key]
        else:
            joining.append(job)
            if job.streamed:
                self._streamed[job.key] = job, 0
