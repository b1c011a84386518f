"""The way of an HTTP request's samples to the teacher and back: bounded in number, one future each."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from distill.errors import PotstillError
from distill.records import Sampling
from teacher.engine.sequence import Logprobs
from teacher.live import GeneratedSample, GenerationRequest, LiveTeacher, OnTokens, StreamHandle


class SampleFuture(Future[GeneratedSample]):
    """A sample that is wanted. With `wake`, its new tokens lie here until they are taken, and `wake` is called, from
    any thread, when there are more."""

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.handle: StreamHandle | None = None
        self._wake = wake
        self._deltas: deque[tuple[list[int], list[Logprobs]]] = deque()

    @property
    def on_tokens(self) -> OnTokens | None:
        return None if self._wake is None else self._add

    def _add(self, token_ids: list[int], logprobs: list[Logprobs]) -> None:
        assert self._wake is not None
        self._deltas.append((token_ids, logprobs))
        self._wake()

    def num_new_tokens(self) -> int:
        return sum(len(token_ids) for token_ids, _ in tuple(self._deltas))

    def take_tokens(self) -> tuple[list[int], list[Logprobs]]:
        """Take the tokens that have come since, and their logprobs, where they were asked for."""
        token_ids: list[int] = []
        logprobs: list[Logprobs] = []
        while self._deltas:
            new_ids, new_logprobs = self._deltas.popleft()
            token_ids += new_ids
            logprobs += new_logprobs
        return token_ids, logprobs


class SampleFeed:
    """Feeds a teacher from many coroutines; `max_unfinished` bounds what has been submitted and is not finished."""

    def __init__(self, teacher: LiveTeacher, *, max_unfinished: int):
        self.teacher = teacher
        self._max_unfinished = max_unfinished
        self._unfinished = 0
        self._lock = threading.Lock()

    def submit(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, wake: Callable[[], object] | None = None
    ) -> list[SampleFuture]:
        """One future a sample, in order, streamed with `wake`. Raises `queue.Full` when too many are unfinished; then
        none is begun."""
        with self._lock:
            if self._unfinished + len(requests) > self._max_unfinished:
                raise queue.Full
            self._unfinished += len(requests)
        return [self._begin(request, sampling, SampleFuture(wake)) for request in requests]

    @property
    def fault(self) -> PotstillError | None:
        return self.teacher.fault

    def num_unfinished(self) -> int:
        return self._unfinished

    def close(self) -> None:
        """Finish what was begun, and let go of the teacher."""
        self.teacher.close()

    def _begin(self, request: GenerationRequest, sampling: Sampling, sample: SampleFuture) -> SampleFuture:
        def on_done(outcome: GeneratedSample | PotstillError) -> None:
            with self._lock:
                self._unfinished -= 1
            _settle(sample, outcome)

        try:
            sample.handle = handle = self.teacher.submit(request, sampling, on_done, sample.on_tokens)
        except PotstillError as exc:
            on_done(exc)
        else:
            sample.add_done_callback(lambda done: handle.cancel() if done.cancelled() else None)
        return sample


def _settle(future: SampleFuture, outcome: GeneratedSample | PotstillError) -> None:
    """Set a future's outcome, unless its client is gone."""
    try:
        if isinstance(outcome, GeneratedSample):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass
