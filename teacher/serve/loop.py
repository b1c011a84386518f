"""An engine that is fed while it runs: sequences join the batch as they come, and leave it when nobody wants them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple

from teacher.serve.engine import Engine
from teacher.serve.sequence import Key, Logprobs, Sequence


@dataclass(frozen=True)
class Withdrawn(Generic[Key]):
    """The sequence with this key is no longer wanted."""

    key: Key


class Grown(NamedTuple, Generic[Key]):
    """What a streamed sequence has written since it was last told of; its end is told by `done` alone."""

    key: Key
    token_ids: list[int]
    logprobs: list[Logprobs]


class EngineLoop(Generic[Key]):
    """Takes jobs from a queue until None comes, calls `done` with every finished sequence, in the caller's thread.

    `grew` hears after a step of all streamed sequences that have grown in it and go on.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: queue.SimpleQueue[Sequence[Key] | Withdrawn[Key] | None],
        done: Callable[[Sequence[Key]], object],
        grew: Callable[[list[Grown[Key]]], object] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._done = done
        self._grew = grew
        self._streamed: dict[Key, tuple[Sequence[Key], int]] = {}  # how many of its tokens have been told
        self._closing = False

    def run(self) -> None:
        while not self._closing:
            first: list[Sequence[Key]] = []
            self._take(self._jobs.get(), first)
            for sequence in self._engine.run(first, more=self._joining):
                self._streamed.pop(sequence.key, None)
                self._done(sequence)

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
                news.append(Grown(key, sequence.generated_ids[num_told:length], sequence.logprobs[num_told:]))
                self._streamed[key] = sequence, length
        if news:
            self._grew(news)

    def _take(self, job: Sequence[Key] | Withdrawn[Key] | None, joining: list[Sequence[Key]]) -> None:
        if job is None:
            self._closing = True
        elif isinstance(job, Withdrawn):
            self._engine.cancel(job.key)
            self._streamed.pop(job.key, None)
            joining[:] = [sequence for sequence in joining if sequence.key != job.key]
        else:
            joining.append(job)
            if job.streamed:
                self._streamed[job.key] = job, 0
