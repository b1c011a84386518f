"""Engines that take sequences at any time: they join the batches as they come, which is what a server needs.

`LocalEngine` runs one on a thread of this process; `WorkerEngines` several, each in a process of its own (for why, see
`teacher.backends.native.workers`), and gives each sequence to the one that has fewest. Both call back from a thread of
theirs.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Many
from functools import partial
from typing import Any, Protocol

from distill.errors import DataError, EnvironmentFault, PotstillError
from teacher.backends.native.workers import (
    END_LINE,
    EngineSettings,
    WorkerProcess,
    begin_line,
    cancel_line,
    take_generated,
)
from teacher.engine.engine import Engine, EngineCounts
from teacher.engine.loop import Cancelled, EngineJob, EngineLoop
from teacher.engine.sequence import Logprobs, Sequence
from teacher.live import OnTokens

OnFinished = Callable[[Sequence[int] | PotstillError], None]
ENDED = "the engine has ended"
CANCELLED = "the request was withdrawn"
# Sequences of a run that travel in one line, several full batches: a whole run may be gigabytes, and with a line each
# the first batches would hold what happened to have been read by then.
LINE_SEQUENCES = 1024
# A run looks so often whether it should go on.
POLL_S = 0.5


class LiveEngine(Protocol):
    """An engine that takes sequences while others are under way."""

    @property
    def fault(self) -> PotstillError | None:
        """The reason why it takes no more sequences, or should be given none: those under way may end yet."""
        ...

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> None:
        """Begin a sequence. `on_done` is called once, with it when it is finished, or with what went wrong; before
        that, if the sequence is streamed, `on_tokens` with the tokens of each step but the last."""
        ...

    def cancel(self, key: int) -> None:
        """Nobody wants the sequence any more: its `on_done` hears so now, unless it is finished, and it ends."""
        ...

    def close(self) -> None:
        """Finish what was begun, and end."""
        ...


class _InFlight:
    """Sequences under way, each with its callbacks; settled once, whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[int, tuple[Sequence[int], OnFinished, OnTokens | None]] = {}
        self.fault: PotstillError | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    def begin(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> bool:
        with self._lock:
            if self.fault is None:
                self._by_key[sequence.key] = sequence, on_done, on_tokens
                return True
        on_done(self.fault)
        return False

    def stream(self, deltas: Iterable[tuple[int, list[int], list[Logprobs]]]) -> None:
        for key, token_ids, logprobs in deltas:
            with self._lock:
                _, _, on_tokens = self._by_key.get(key, (None, None, None))
            if on_tokens is not None:
                on_tokens(token_ids, logprobs)

    def finish(self, key: int, take: Callable[[Sequence[int]], object] = lambda _: None) -> None:
        """Settle a sequence, unless it was cancelled, once `take` has written into it what was generated."""
        with self._lock:
            sequence, on_done, _ = self._by_key.pop(key, (None, None, None))
        if sequence is not None and on_done is not None:
            take(sequence)
            on_done(sequence if sequence.fault is None else DataError(sequence.fault))

    def cancel(self, key: int) -> bool:
        with self._lock:
            _, on_done, _ = self._by_key.pop(key, (None, None, None))
        if on_done is not None:
            on_done(EnvironmentFault(CANCELLED))
        return on_done is not None

    def fail(self, fault: PotstillError) -> None:
        """Settle everything under way with a fault, and all that is begun from now on."""
        with self._lock:
            self.fault = self.fault or fault
            left, self._by_key = list(self._by_key.values()), {}
        for _, on_done, _ in left:
            on_done(fault)


class LocalEngine:
    def __init__(self, engine: Engine) -> None:
        self._in_flight = _InFlight()
        self._jobs: queue.SimpleQueue[EngineJob[int] | None] = queue.SimpleQueue()
        self._loop = EngineLoop(
            engine, self._jobs, lambda done: self._in_flight.finish(done.key), self._in_flight.stream
        )
        self._thread = threading.Thread(target=self._run, name="potstill-engine", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> PotstillError | None:
        return self._in_flight.fault

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> None:
        if self._in_flight.begin(sequence, on_done, on_tokens):
            self._jobs.put([sequence])

    def cancel(self, key: int) -> None:
        if self._in_flight.cancel(key):
            self._jobs.put(Cancelled(key))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        fault: PotstillError = EnvironmentFault(ENDED)
        try:
            self._loop.run()
        except Exception as exc:  # noqa: BLE001 - whoever waits for a sequence must hear of it
            fault = EnvironmentFault(f"{ENDED}: {type(exc).__name__}: {exc}")
        self._in_flight.fail(fault)


class Worker(Protocol):
    """A `teacher.backends.native.workers.WorkerProcess`, or a rank on another node."""

    def write(self, line: str) -> None: ...

    def lines(self) -> Iterator[str]: ...

    def check(self) -> None: ...

    def kill(self) -> None: ...


class WorkerEngines:
    """Over workers that were started; `stack` is closed with them. If one is lost, all are ended."""

    def __init__(self, crew: Many[Worker], stack: contextlib.ExitStack) -> None:
        self._crew, self._stack = crew, stack
        self._in_flight = [_InFlight() for _ in crew]
        self._lock = threading.Lock()
        self._fault: PotstillError | None = None
        self._counts = [EngineCounts() for _ in crew]
        self._threads = [threading.Thread(target=self._read, args=(n,), daemon=True) for n in range(len(crew))]
        for thread in self._threads:
            thread.start()

    @classmethod
    def started(cls, engine: EngineSettings, *, num_workers: int) -> WorkerEngines:
        stack = contextlib.ExitStack()
        settings = json.dumps(engine.packed())
        return cls([stack.enter_context(WorkerProcess(settings)) for _ in range(num_workers)], stack)

    @property
    def fault(self) -> PotstillError | None:
        return self._fault

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> None:
        with self._lock:
            number = min(range(len(self._crew)), key=lambda n: len(self._in_flight[n]))
            if self._in_flight[number].begin(sequence, on_done, on_tokens):
                self._crew[number].write(begin_line([sequence]))

    @property
    def counts(self) -> EngineCounts:
        """Those of all workers, as they were a second ago at the most."""
        return EngineCounts(*map(sum, zip(*self._counts, strict=True)))

    def cancel(self, key: int) -> None:
        self._cancel([key])

    def run(self, sequences: Many[Sequence[int]], *, last: bool = False) -> Generator[Sequence[int], None, None]:
        """Yield each sequence once it is finished, with its `fault` where it has one, as `Engine.run`.

        Raises what ends the engines. Whoever abandons the run abandons its sequences; the `last` run ends the engines
        with it. Workers take turns, so that the same sequences share a worker in every run.
        """
        outcomes: queue.SimpleQueue[tuple[Sequence[int], PotstillError | None]] = queue.SimpleQueue()

        def settles(sequence: Sequence[int]) -> OnFinished:
            return lambda outcome: outcomes.put((sequence, outcome if isinstance(outcome, PotstillError) else None))

        left = {sequence.key for sequence in sequences}
        try:
            most = LINE_SEQUENCES * len(self._crew)
            for start in range(0, len(sequences), most):
                self._hand_out(sequences[start : start + most], settles)
            while left:
                if self.fault is not None:
                    raise self.fault
                with contextlib.suppress(queue.Empty):
                    sequence, problem = outcomes.get(timeout=POLL_S)
                    left.remove(sequence.key)
                    if problem is not None and sequence.fault is None:
                        raise problem
                    yield sequence
        finally:
            if last:
                self.abort()
            else:
                self._cancel(left)

    def _hand_out(self, sequences: Many[Sequence[int]], settles: Callable[[Sequence[int]], OnFinished]) -> None:
        with self._lock:
            for number, (worker, in_flight) in enumerate(zip(self._crew, self._in_flight, strict=True)):
                share = sequences[number :: len(self._crew)]
                if begun := [sequence for sequence in share if in_flight.begin(sequence, settles(sequence))]:
                    worker.write(begin_line(begun))

    def _cancel(self, keys: Iterable[int]) -> None:
        keys = list(keys)
        with self._lock:
            for worker, in_flight in zip(self._crew, self._in_flight, strict=True):
                if cancelled := [key for key in keys if in_flight.cancel(key)]:
                    worker.write(cancel_line(cancelled))

    def close(self) -> None:
        with self._lock:
            for worker in self._crew:
                worker.write(END_LINE)
        self._end()

    def abort(self) -> None:
        """End at once what is under way."""
        for worker in self._crew:
            worker.kill()
        self._end()

    def _end(self) -> None:
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def _read(self, number: int) -> None:
        worker, in_flight = self._crew[number], self._in_flight[number]
        for line in worker.lines():
            news = json.loads(line)
            if isinstance(news, dict):
                self._tell(number, news)
            else:
                key, *generated = news
                in_flight.finish(key, partial(take_generated, generated=generated))
        try:
            worker.check()
        except PotstillError as exc:
            self._lose(exc)
        else:
            in_flight.fail(EnvironmentFault(ENDED))

    def _tell(self, number: int, news: dict[str, Any]) -> None:
        if "counts" in news:
            self._counts[number] = EngineCounts(*news["counts"])
        else:
            self._in_flight[number].stream(news["deltas"])

    def _lose(self, fault: PotstillError) -> None:
        """A worker ended that should not have: so do all."""
        self._fault = self._fault or fault
        for in_flight in self._in_flight:
            in_flight.fail(fault)
        for worker in self._crew:
            worker.kill()


def generate_in_workers(
    engine: EngineSettings,
    sequences: Many[Sequence[int]],
    *,
    num_workers: int,
    on_start: Callable[[WorkerEngines], object] = lambda _: None,
) -> Generator[Sequence[int], None, None]:
    """Yield the sequences, finished, in the order in which that happens. Raises EnvironmentFault if a worker dies.

    `on_start` is given the workers. Abandoning the iterator ends them.
    """
    engines = WorkerEngines.started(engine, num_workers=num_workers)
    on_start(engines)
    yield from engines.run(sequences, last=True)
