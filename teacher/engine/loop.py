"""An engine that is fed while it runs: sequences join the batch as they come, and leave it when nobody wants them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias

from teacher.engine.engine import Engine, Lockstep
from teacher.engine.sequence import Key, Logprobs, Sequence

# How often ranks ask each other for work while there is none: a request waits that long at the most to be begun.
IDLE_S = 0.01


@dataclass(frozen=True)
class Cancelled(Generic[Key]):
    """Nobody wants the sequence with this key any more."""

    key: Key


class TokenDelta(NamedTuple, Generic[Key]):
    """The tokens of a streamed sequence since those that were told last; its end is told by `on_done` alone."""

    key: Key
    token_ids: list[int]
    logprobs: list[Logprobs]


EngineJob: TypeAlias = list[Sequence[Key]] | Cancelled[Key]


class EngineLoop(Generic[Key]):
    """Takes jobs from a queue until None comes, calls `on_done` with every finished sequence, in the caller's thread.

    Sequences that come in one job are begun together. `on_deltas` hears after a step of all streamed sequences that
    have grown in it and go on; `on_step` is called after every step. With `lockstep`, which is the engine's, runs begin
    and end on all ranks together, and None must come to all of them.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: queue.SimpleQueue[EngineJob[Key] | None],
        on_done: Callable[[Sequence[Key]], object],
        on_deltas: Callable[[list[TokenDelta[Key]]], object] = lambda _: None,
        lockstep: Lockstep | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._on_done = on_done
        self._on_deltas = on_deltas
        self._lockstep = lockstep
        self._on_step = on_step
        self._streamed: dict[Key, tuple[Sequence[Key], int]] = {}  # how many of its tokens have been told
        self._closing = False

    def run(self) -> None:
        while (first := self._first()) is not None:
            for sequence in self._engine.run(first, more=self._joining):
                self._streamed.pop(sequence.key, None)
                self._on_done(sequence)

    def _first(self) -> list[Sequence[Key]] | None:
        """Take what the next run begins with, once there is work, here or on another rank; None at the end."""
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
        self._on_step()
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
            self._on_deltas(news)

    def _take(self, job: EngineJob[Key] | None, joining: list[Sequence[Key]]) -> None:
        if job is None:
            self._closing = True
        elif isinstance(job, Cancelled):
            self._engine.cancel(job.key)
            self._streamed.pop(job.key, None)
            joining[:] = [sequence for sequence in joining if sequence.key != job.key]
        else:
            joining += job
            self._streamed.update({sequence.key: (sequence, 0) for sequence in job if sequence.streamed})
