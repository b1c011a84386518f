"""Requests that arrive together are generated together.

A teacher that takes requests at any time (`LiveTeacher`: the native one) is simply given them: they join the batch
that is running. For any other there is the `Batcher`: one thread owns the teacher (a model is not thread-safe). It
takes the first waiting request, lingers a few milliseconds for more, groups what it has by sampling settings and hands
each group to `Teacher.generate` as one batch. A request that arrives while a batch runs waits for the next one: the
Teacher protocol has no way to join a running batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from distill.errors import EnvironmentFault, PotstillError
from distill.protocols import Teacher
from distill.records import Completion, Sampling, TraceRequest


@dataclass(frozen=True)
class _Waiting:
    request: TraceRequest
    sampling: Sampling
    future: Future[Completion] = field(default_factory=Future)


@runtime_checkable
class LiveTeacher(Protocol):
    """A Teacher that takes requests while others are under way."""

    def submit(
        self, request: TraceRequest, sampling: Sampling, settle: Callable[[Completion | PotstillError], None]
    ) -> None:
        """Begin one request; `settle` is called once, from any thread. Raises PotstillError for a bad request."""
        ...


class Live:
    """What `Batcher` is, for a `LiveTeacher`: `max_unfinished` bounds what has been submitted and is not finished."""

    def __init__(self, teacher: Teacher, *, max_unfinished: int):
        assert isinstance(teacher, LiveTeacher)
        self.teacher = teacher
        self._live: LiveTeacher = teacher
        self._max_unfinished = max_unfinished
        self._unfinished = 0
        self._lock = threading.Lock()

    def submit(self, requests: Sequence[TraceRequest], sampling: Sampling) -> list[Future[Completion]]:
        """One future a request, in order. Raises `queue.Full` when too many are unfinished; then none is begun."""
        with self._lock:
            if self._unfinished + len(requests) > self._max_unfinished:
                raise queue.Full
            self._unfinished += len(requests)
        return [self._begin(request, sampling) for request in requests]

    def num_waiting(self) -> int:
        return self._unfinished

    def close(self) -> None:
        """Finish what was begun, and let go of the teacher."""
        self.teacher.close()

    def _begin(self, request: TraceRequest, sampling: Sampling) -> Future[Completion]:
        future: Future[Completion] = Future()

        def settle(outcome: Completion | PotstillError) -> None:
            with self._lock:
                self._unfinished -= 1
            _settle(future, outcome)

        try:
            self._live.submit(request, sampling, settle)
        except PotstillError as exc:
            settle(exc)
        return future


class Batcher:
    """Feeds one teacher from many threads or coroutines.

    `max_batch` requests at most are taken into one batch, `linger_s` is how long the first of them waits for company,
    `max_waiting` bounds the queue: beyond it `submit` raises `queue.Full`.
    """

    def __init__(self, teacher: Teacher, *, max_batch: int = 64, linger_s: float = 0.01, max_waiting: int = 4096):
        self.teacher = teacher
        self._max_batch = max_batch
        self._linger_s = linger_s
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="potstill-batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[TraceRequest], sampling: Sampling) -> list[Future[Completion]]:
        """One future a request, in order. Raises `queue.Full` when too many wait; then none of them is generated."""
        waiting = [_Waiting(request, sampling) for request in requests]
        for entered, entry in enumerate(waiting):
            try:
                self._waiting.put_nowait(entry)
            except queue.Full:
                for earlier in waiting[:entered]:
                    earlier.future.cancel()
                raise
        return [entry.future for entry in waiting]

    def num_waiting(self) -> int:
        return self._waiting.qsize()

    def close(self) -> None:
        """Finish the running batch, fail what still waits, and let go of the teacher."""
        self._waiting.put(None)
        self._thread.join()
        self.teacher.close()

    def _run(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._collect()
            groups: dict[Sampling, list[_Waiting]] = {}
            for entry in batch:
                if entry.future.set_running_or_notify_cancel():
                    groups.setdefault(entry.sampling, []).append(entry)
            for sampling, entries in groups.items():
                self._generate(entries, sampling)
        while not self._waiting.empty():
            entry = self._waiting.get()
            if entry is not None:
                _settle(entry.future, EnvironmentFault("the server is shutting down"))

    def _collect(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether more may follow it."""
        first = self._waiting.get()
        if first is None:
            return [], False
        batch, until = [first], time.monotonic() + self._linger_s
        while len(batch) < self._max_batch:
            try:
                entry = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                return batch, False
            batch.append(entry)
        return batch, True

    def _generate(self, entries: Sequence[_Waiting], sampling: Sampling) -> None:
        """Equal requests (same question, index and seed) have equal answers: they are generated once."""
        futures: dict[str, list[Future[Completion]]] = {}
        requests: dict[str, TraceRequest] = {}
        for entry in entries:
            key = entry.request.key(self.teacher.identity, sampling)
            futures.setdefault(key, []).append(entry.future)
            requests[key] = entry.request
        fault: PotstillError = EnvironmentFault("the teacher ended without an answer to this request")
        try:
            for completion in self.teacher.generate(list(requests.values()), sampling):
                for future in futures.pop(completion.request.key(self.teacher.identity, sampling)):
                    _settle(future, completion)
        except Exception as exc:  # noqa: BLE001 - one bad batch must not end the server; its requests get the fault
            fault = exc if isinstance(exc, PotstillError) else EnvironmentFault(f"{type(exc).__name__}: {exc}")
        for rest in futures.values():
            for future in rest:
                _settle(future, fault)


def _settle(future: Future[Completion], outcome: Completion | PotstillError) -> None:
    """Set a future's outcome, unless its client is gone."""
    try:
        if isinstance(outcome, Completion):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass
