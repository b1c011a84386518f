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
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol, runtime_checkable

from distill.errors import EnvironmentFault, PotstillError, UserInputError
from distill.protocols import Teacher
from distill.records import Completion, Sampling, TraceRequest
from teacher.serve.reasoning import THINK
from teacher.serve.sequence import Logprobs
from teacher.serve.stopping import RepetitionLimit, cut


@dataclass(frozen=True)
class Settings:
    """What a request may say beyond its `Sampling`, under the names that it has over HTTP.

    Every Teacher honours `stop`, the others need the native engine (`teacher.serve.sampler` says what they do).
    """

    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_detection: RepetitionLimit | None = None


class Asked(NamedTuple):
    """One sample that is wanted: the answer to a question, or what goes on from a beginning.

    `written` is what the answer says already; `prompt_ids`, where there are any, are all that stands before the
    completion, and the question is not read.
    """

    request: TraceRequest
    written: str = ""
    prompt_ids: tuple[int, ...] = ()
    settings: Settings = Settings()

    @property
    def goes_on(self) -> bool:
        return bool(self.written or self.prompt_ids)


class Written(NamedTuple):
    """A completion and its tokens, where the teacher knows them; the text of one that goes on is what was added.

    `opening` is what of the text stands in the prompt: the tokens wrote the rest. `stop_reason` is the stop string that
    ended it, or `LOOPED`. `num_accepted` of `num_drafts` tokens that a teacher drafted came true.
    """

    completion: Completion
    prompt_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    opening: str = ""
    stop_reason: str | None = None
    num_drafts: int = 0
    num_accepted: int = 0


LOOPED = "repetition_detected"  # vLLM's word


class Begun(NamedTuple):
    """A sample that a `LiveTeacher` has begun. `withdraw` ends it; the rest is as in `Written`."""

    withdraw: Callable[[], None]
    prompt_ids: Sequence[int]
    opening: str


class Sample(Future[Written]):
    """One that is wanted. With `wake`, what it has grown by lies here until it is taken, and `wake` is called, from
    any thread, when there is more."""

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.begun: Begun | None = None
        self._wake = wake
        self._news: deque[tuple[list[int], list[Logprobs]]] = deque()

    @property
    def grow(self) -> Callable[[list[int], list[Logprobs]], None] | None:
        return None if self._wake is None else self._grow

    def _grow(self, token_ids: list[int], logprobs: list[Logprobs]) -> None:
        assert self._wake is not None
        self._news.append((token_ids, logprobs))
        self._wake()

    def num_grown(self) -> int:
        return sum(len(token_ids) for token_ids, _ in tuple(self._news))

    def take(self) -> tuple[list[int], list[Logprobs]]:
        """The tokens that have come since, and their logprobs, where they were asked for."""
        token_ids: list[int] = []
        logprobs: list[Logprobs] = []
        while self._news:
            new_ids, new_logprobs = self._news.popleft()
            token_ids += new_ids
            logprobs += new_logprobs
        return token_ids, logprobs


@dataclass(frozen=True)
class _Waiting:
    request: TraceRequest
    sampling: Sampling
    stop: tuple[str, ...] = ()
    future: Sample = field(default_factory=Sample)


@runtime_checkable
class LiveTeacher(Protocol):
    """A Teacher that takes requests while others are under way, goes on from any beginning and knows its tokens."""

    @property
    def fault(self) -> PotstillError | None:
        """Why it takes no more requests, or should be given none; those under way may be finished yet."""
        ...

    def submit(
        self,
        asked: Asked,
        sampling: Sampling,
        settle: Callable[[Written | PotstillError], None],
        grow: Callable[[list[int], list[Logprobs]], None] | None = None,
    ) -> Begun:
        """Begin one sample; `settle` is called once, from any thread, and before it `grow`, if there is one, with the
        tokens of every step. Raises PotstillError for a bad request.

        Where the sample is withdrawn, `settle` hears that it was, and what it holds is freed.
        """
        ...

    def gauges(self) -> dict[str, float]:
        """Numbers of its own for `/metrics`, by name."""
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

    def submit(
        self, asked: Sequence[Asked], sampling: Sampling, wake: Callable[[], object] | None = None
    ) -> list[Sample]:
        """One future a sample, in order, streamed with `wake`. Raises `queue.Full` when too many are unfinished; then
        none is begun."""
        with self._lock:
            if self._unfinished + len(asked) > self._max_unfinished:
                raise queue.Full
            self._unfinished += len(asked)
        return [self._begin(one, sampling, Sample(wake)) for one in asked]

    @property
    def fault(self) -> PotstillError | None:
        return self._live.fault

    def num_waiting(self) -> int:
        return self._unfinished

    def close(self) -> None:
        """Finish what was begun, and let go of the teacher."""
        self.teacher.close()

    def _begin(self, asked: Asked, sampling: Sampling, sample: Sample) -> Sample:
        def settle(outcome: Written | PotstillError) -> None:
            with self._lock:
                self._unfinished -= 1
            _settle(sample, outcome)

        try:
            sample.begun = begun = self._live.submit(asked, sampling, settle, sample.grow)
        except PotstillError as exc:
            settle(exc)
        else:
            sample.add_done_callback(lambda done: begun.withdraw() if done.cancelled() else None)
        return sample


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

    def submit(
        self, asked: Sequence[Asked], sampling: Sampling, wake: Callable[[], object] | None = None
    ) -> list[Sample]:
        """One future a sample, in order; none grows before it is finished, and `wake` is not called.

        Raises `queue.Full` when too many wait (then none of them is generated), and UserInputError for what the Teacher
        protocol has no word for: going on from a beginning, and every setting but `stop`, which cuts the finished text.
        """
        for one in asked:
            if one.goes_on:
                message = "this teacher answers questions alone, it goes on from no beginning"
                raise UserInputError(message, field="prompt")
            for name in (entry.name for entry in fields(Settings) if entry.name != "stop"):
                if getattr(one.settings, name) != getattr(Settings(), name):
                    raise UserInputError("this teacher's backend does not take it", field=name)
        waiting = [_Waiting(one.request, sampling, one.settings.stop) for one in asked]
        for entered, entry in enumerate(waiting):
            try:
                self._waiting.put_nowait(entry)
            except queue.Full:
                for earlier in waiting[:entered]:
                    earlier.future.cancel()
                raise
        return [entry.future for entry in waiting]

    @property
    def fault(self) -> PotstillError | None:
        """One bad batch is no reason to end: the next one is tried."""
        return None

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
        waiting: dict[str, list[_Waiting]] = {}
        requests: dict[str, TraceRequest] = {}
        for entry in entries:
            key = entry.request.key(self.teacher.identity, sampling)
            waiting.setdefault(key, []).append(entry)
            requests[key] = entry.request
        fault: PotstillError = EnvironmentFault("the teacher ended without an answer to this request")
        try:
            for completion in self.teacher.generate(list(requests.values()), sampling):
                for entry in waiting.pop(completion.request.key(self.teacher.identity, sampling)):
                    _settle(entry.future, _cut(completion, entry.stop))
        except Exception as exc:  # noqa: BLE001 - one bad batch must not end the server; its requests get the fault
            fault = exc if isinstance(exc, PotstillError) else EnvironmentFault(f"{type(exc).__name__}: {exc}")
        for rest in waiting.values():
            for entry in rest:
                _settle(entry.future, fault)


def _cut(completion: Completion, stop: tuple[str, ...]) -> Written:
    """As an engine that had watched for the stop strings would have left it; what is behind them was paid for."""
    opening = THINK if completion.text.startswith(THINK) else ""
    text, found = cut(completion.text.removeprefix(opening), stop)
    if found is None:
        return Written(completion)
    ended = completion.model_copy(update={"text": opening + text, "finish_reason": "stop"})
    return Written(ended, stop_reason=found)


def _settle(future: Sample, outcome: Written | PotstillError) -> None:
    """Set a future's outcome, unless its client is gone."""
    try:
        if isinstance(outcome, Written):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass
