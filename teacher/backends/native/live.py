"""Engines that take sequences at any time: they join the batches as they come, which is what a server needs.

`LocalEngine` runs one on a thread of this process; `WorkerEngines` several, each in a process of its own (for why, see
`teacher.backends.native.workers`), and gives each sequence to the one that has fewest. Both call back from a thread of
theirs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence as Many
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
Cancel = Callable[[], None]
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

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> Cancel:
        """Begin a sequence. `on_done` is called once, with it when it is finished, or with what went wrong; before
        that, if the sequence is streamed, `on_tokens` with the tokens of each step but the last.

        What is returned is to be called when nobody wants it any more: its `on_done` hears so, unless it is finished.
        """
        ...

    def close(self) -> None:
        """Finish what was begun, and end."""
        ...


class _InFlight:
    """Sequences under way, each with its callbacks; settled once, whoever comes first.

    They are known by numbers that are never used again: what an engine still says of one that was given up is of no
    other, whatever keys its callers give.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._by_number: dict[int, tuple[Sequence[int], OnFinished, OnTokens | None]] = {}
        self.fault: PotstillError | None = None

    def __len__(self) -> int:
        return len(self._by_number)

    def begin(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> int | None:
        """Its number; None where nothing is begun any more, which `on_done` has heard."""
        with self._lock:
            if self.fault is None:
                number = next(self._numbers)
                self._by_number[number] = sequence, on_done, on_tokens
                return number
        on_done(self.fault)
        return None

    def stream(self, deltas: Iterable[tuple[int, list[int], list[Logprobs]]]) -> None:
        for number, token_ids, logprobs in deltas:
            with self._lock:
                _, _, on_tokens = self._by_number.get(number, (None, None, None))
            if on_tokens is not None:
                on_tokens(token_ids, logprobs)

    def finish(self, number: int, take: Callable[[Sequence[int]], object] = lambda _: None) -> None:
        """Settle a sequence, unless it was cancelled, once `take` has written into it what was generated.

        Raises what goes wrong in that, which is told to whoever waits for it first.
        """
        with self._lock:
            sequence, on_done, _ = self._by_number.pop(number, (None, None, None))
        if sequence is None or on_done is None:
            return
        try:
            take(sequence)
            on_done(sequence if sequence.fault is None else DataError(sequence.fault))
        except Exception as exc:
            on_done(EnvironmentFault(f"the answer could not be put together: {type(exc).__name__}: {exc}"))
            raise

    def cancel(self, number: int) -> bool:
        with self._lock:
            _, on_done, _ = self._by_number.pop(number, (None, None, None))
        if on_done is not None:
            on_done(EnvironmentFault(CANCELLED))
        return on_done is not None

    def fail(self, fault: PotstillError) -> None:
        """Settle everything under way with a fault, and all that is begun from now on."""
        with self._lock:
            self.fault = self.fault or fault
            left, self._by_number = list(self._by_number.values()), {}
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

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> Cancel:
        number = self._in_flight.begin(sequence, on_done, on_tokens)
        if number is None:
            return lambda: None
        sequence.key = number
        self._jobs.put([sequence])
        return lambda: self._cancel(number)

    def _cancel(self, number: int) -> None:
        if self._in_flight.cancel(number):
            self._jobs.put(Cancelled(number))

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

    def submit(self, sequence: Sequence[int], on_done: OnFinished, on_tokens: OnTokens | None = None) -> Cancel:
        with self._lock:
            place = min(range(len(self._crew)), key=lambda n: len(self._in_flight[n]))
            number = self._in_flight[place].begin(sequence, on_done, on_tokens)
            if number is None:
                return lambda: None
            self._crew[place].write(begin_line([(number, sequence)]))
        return lambda: self._cancel([(place, number)])

    @property
    def counts(self) -> EngineCounts:
        """Those of all workers, as they were a second ago at the most."""
        return EngineCounts(*map(sum, zip(*self._counts, strict=True)))

    def run(self, sequences: Many[Sequence[int]], *, last: bool = False) -> Generator[Sequence[int], None, None]:
        """Yield each sequence once it is finished, with its `fault` where it has one, as `Engine.run`.

        Raises what ends the engines. Whoever abandons the run abandons its sequences; the `last` run ends the engines
        with it. Workers take turns, so that the same sequences share a worker in every run.
        """
        outcomes: queue.SimpleQueue[tuple[Sequence[int], PotstillError | None]] = queue.SimpleQueue()

        def settles(sequence: Sequence[int]) -> OnFinished:
            return lambda outcome: outcomes.put((sequence, outcome if isinstance(outcome, PotstillError) else None))

        begun: list[tuple[int, int]] = []
        num_left = len(sequences)
        try:
            most = LINE_SEQUENCES * len(self._crew)
            for start in range(0, len(sequences), most):
                begun += self._hand_out(sequences[start : start + most], settles)
            while num_left:
                if self.fault is not None:
                    raise self.fault
                with contextlib.suppress(queue.Empty):
                    sequence, problem = outcomes.get(timeout=POLL_S)
                    num_left -= 1
                    if problem is not None and sequence.fault is None:
                        raise problem
                    yield sequence
        finally:
            if last:
                self.abort()
            else:
                self._cancel(begun)

    def _hand_out(
        self, sequences: Many[Sequence[int]], settles: Callable[[Sequence[int]], OnFinished]
    ) -> list[tuple[int, int]]:
        """The worker and the number of each that was begun."""
        handed = []
        with self._lock:
            for place, (worker, in_flight) in enumerate(zip(self._crew, self._in_flight, strict=True)):
                share = sequences[place :: len(self._crew)]
                numbers = [in_flight.begin(sequence, settles(sequence)) for sequence in share]
                begun = [(number, one) for number, one in zip(numbers, share, strict=True) if number is not None]
                if begun:
                    worker.write(begin_line(begun))
                handed += [(place, number) for number, _ in begun]
        return handed

    def _cancel(self, begun: Iterable[tuple[int, int]]) -> None:
        """Give up those that are not finished, by worker and number."""
        with self._lock:
            cancelled: dict[int, list[int]] = {}
            for place, number in begun:
                if self._in_flight[place].cancel(number):
                    cancelled.setdefault(place, []).append(number)
            for place, numbers in cancelled.items():
                self._crew[place].write(cancel_line(numbers))

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
        try:
            for line in worker.lines():
                self._hear(number, json.loads(line))
            worker.check()
        except PotstillError as exc:
            self._lose(exc)
        except Exception as exc:  # noqa: BLE001 - whoever waits for a sequence must hear of it
            self._lose(EnvironmentFault(f"{ENDED}: {type(exc).__name__}: {exc}"))
        else:
            in_flight.fail(EnvironmentFault(ENDED))

    def _hear(self, number: int, news: Any) -> None:
        if isinstance(news, dict):
            self._tell(number, news)
        else:
            finished, *generated = news
            self._in_flight[number].finish(finished, partial(take_generated, generated=generated))

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
