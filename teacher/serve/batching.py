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
from typing import NamedTuple, Protocol, runtime_checkable

from distill.errors import EnvironmentFault, PotstillError, UserInputError
from distill.protocols import Teacher
from distill.records import Completion, Sampling, TraceRequest


class Asked(NamedTuple):
    """One sample that is wanted: the answer to a question, or what goes on from a beginning.

    `written` is what the answer says already; `prompt_ids`, where there are any, are all that stands before the
    completion, and the question is not read.
    """

    request: TraceRequest
    written: str = ""
    prompt_ids: tuple[int, ...] = ()

    @property
    def goes_on(self) -> bool:
        return bool(self.written or self.prompt_ids)


class Written(NamedTuple):
    """A completion and its tokens, where the teacher knows them; the text of one that goes on is what was added.

    `opening` is what of the text stands in the prompt: the tokens wrote the rest. `num_accepted` of `num_drafts` tokens
    that a teacher drafted came true.
    """

    completion: Completion
    prompt_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    opening: str = ""
    num_drafts: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class _Waiting:
    request: TraceRequest
    sampling: Sampling
    future: Future[Written] = field(default_factory=Future)


@runtime_checkable
class LiveTeacher(Protocol):
    """A Teacher that takes requests while others are under way, goes on from any beginning and knows its tokens."""

    def submit(
        self, asked: Asked, sampling: Sampling, settle: Callable[[Written | PotstillError], None]
    ) -> Callable[[], None]:
        """Begin one sample; `settle` is called once, from any thread. Raises PotstillError for a bad request.

        What is returned withdraws the sample: `settle` then hears that it was, and what it holds is freed.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with none added for its beginning or end."""
        ...

    def spell(self, *token_ids: int) -> str:
        """The text of these tokens alone; U+FFFD for bytes that are no text."""
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

    def submit(self, asked: Sequence[Asked], sampling: Sampling) -> list[Future[Written]]:
        """One future a sample, in order. Raises `queue.Full` when too many are unfinished; then none is begun."""
        with self._lock:
            if self._unfinished + len(asked) > self._max_unfinished:
                raise queue.Full
            self._unfinished += len(asked)
        return [self._begin(one, sampling) for one in asked]

    def num_waiting(self) -> int:
        return self._unfinished

    def close(self) -> None:
        """Finish what was begun, and let go of the teacher."""
        self.teacher.close()

    def _begin(self, asked: Asked, sampling: Sampling) -> Future[Written]:
        future: Future[Written] = Future()

        def settle(outcome: Written | PotstillError) -> None:
            with self._lock:
                self._unfinished -= 1
            _settle(future, outcome)

        try:
            withdraw = self._live.submit(asked, sampling, settle)
        except PotstillError as exc:
            settle(exc)
        else:
            future.add_done_callback(lambda done: withdraw() if done.cancelled() else None)
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

    def submit(self, asked: Sequence[Asked], sampling: Sampling) -> list[Future[Written]]:
        """One future a sample, in order. Raises `queue.Full` when too many wait (then none of them is generated) and
        UserInputError for one that goes on from a beginning: the Teacher protocol knows questions alone."""
        if any(one.goes_on for one in asked):
            raise UserInputError("this teacher answers questions alone, it goes on from no beginning", field="prompt")
        waiting = [_Waiting(one.request, sampling) for one in asked]
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
        futures: dict[str, list[Future[Written]]] = {}
        requests: dict[str, TraceRequest] = {}
        for entry in entries:
            key = entry.request.key(self.teacher.identity, sampling)
            futures.setdefault(key, []).append(entry.future)
            requests[key] = entry.request
        fault: PotstillError = EnvironmentFault("the teacher ended without an answer to this request")
        try:
            for completion in self.teacher.generate(list(requests.values()), sampling):
                for future in futures.pop(completion.request.key(self.teacher.identity, sampling)):
                    _settle(future, Written(completion))
        except Exception as exc:  # noqa: BLE001 - one bad batch must not end the server; its requests get the fault
            fault = exc if isinstance(exc, PotstillError) else EnvironmentFault(f"{type(exc).__name__}: {exc}")
        for rest in futures.values():
            for future in rest:
                _settle(future, fault)


def _settle(future: Future[Written], outcome: Written | PotstillError) -> None:
    """Set a future's outcome, unless its client is gone."""
    try:
        if isinstance(outcome, Written):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass
