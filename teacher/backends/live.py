"""Engines that stay: sequences join their batches as they come, which is what a server needs.

`LocalEngine` runs one on a thread of this process; `WorkerEngines` several, each in a process of its own (for why, see
`teacher.backends.workers`), and gives each sequence to the one that has fewest. Both call back from a thread of theirs.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from functools import partial
from typing import Any, Protocol

from distill.errors import DataError, EnvironmentFault, PotstillError
from teacher.backends.workers import EngineSettings, LiveWorker, packed, take_generated
from teacher.serve.engine import Engine
from teacher.serve.loop import Cancelled, EngineLoop
from teacher.serve.sequence import Logprobs, Sequence

Done = Callable[[Sequence[int] | PotstillError], None]
Grew = Callable[[list[int], list[Logprobs]], None]
ENDED = "the engine has ended"
WITHDRAWN = "the request was withdrawn"


class LiveEngine(Protocol):
    @property
    def fault(self) -> PotstillError | None:
        """Why it takes no more sequences, or should be given none: those under way may end yet."""
        ...

    def submit(self, sequence: Sequence[int], done: Done, grew: Grew | None = None) -> None:
        """Begin a sequence. `done` is called once, with it when it is finished, or with what went wrong; before that,
        if the sequence is streamed, `grew` with the tokens of each step but the last."""
        ...

    def withdraw(self, key: int) -> None:
        """Nobody wants the sequence any more: its `done` hears so now, unless it is finished, and it ends."""
        ...

    def close(self) -> None:
        """Finish what was begun, and end."""
        ...


class _Begun:
    """Sequences under way, each with its callback; settled once, whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[int, tuple[Sequence[int], Done, Grew | None]] = {}
        self.fault: PotstillError | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    def begin(self, sequence: Sequence[int], done: Done, grew: Grew | None) -> bool:
        with self._lock:
            if self.fault is None:
                self._by_key[sequence.key] = sequence, done, grew
                return True
        done(self.fault)
        return False

    def grow(self, news: Iterable[tuple[int, list[int], list[Logprobs]]]) -> None:
        for key, token_ids, logprobs in news:
            with self._lock:
                _, _, grew = self._by_key.get(key, (None, None, None))
            if grew is not None:
                grew(token_ids, logprobs)

    def finish(self, key: int, take: Callable[[Sequence[int]], object] = lambda _: None) -> None:
        """Settle a sequence, unless it was withdrawn, once `take` has written into it what was generated."""
        with self._lock:
            sequence, done, _ = self._by_key.pop(key, (None, None, None))
        if sequence is not None and done is not None:
            take(sequence)
            done(sequence if sequence.fault is None else DataError(sequence.fault))

    def withdraw(self, key: int) -> bool:
        with self._lock:
            _, done, _ = self._by_key.pop(key, (None, None, None))
        if done is not None:
            done(EnvironmentFault(WITHDRAWN))
        return done is not None

    def fail(self, fault: PotstillError) -> None:
        """Everything under way, and all that is begun from now on."""
        with self._lock:
            self.fault = self.fault or fault
            left, self._by_key = list(self._by_key.values()), {}
        for _, done, _ in left:
            done(fault)


class LocalEngine:
    def __init__(self, engine: Engine) -> None:
        self._begun = _Begun()
        self._jobs: queue.SimpleQueue[Sequence[int] | Cancelled[int] | None] = queue.SimpleQueue()
        self._loop = EngineLoop(engine, self._jobs, lambda done: self._begun.finish(done.key), self._begun.grow)
        self._thread = threading.Thread(target=self._run, name="potstill-engine", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> PotstillError | None:
        return self._begun.fault

    def submit(self, sequence: Sequence[int], done: Done, grew: Grew | None = None) -> None:
        if self._begun.begin(sequence, done, grew):
            self._jobs.put(sequence)

    def withdraw(self, key: int) -> None:
        if self._begun.withdraw(key):
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
        self._begun.fail(fault)


class Worker(Protocol):
    """What `teacher.backends.workers.LiveWorker` is, and a rank on another node too."""

    def write(self, line: str) -> None: ...

    def lines(self) -> Iterator[str]: ...

    def check(self) -> None: ...

    def kill(self) -> None: ...


class WorkerEngines:
    """Over workers that were started; `stack` is closed with them. If one is lost, all are ended."""

    def __init__(self, crew: Many[Worker], stack: contextlib.ExitStack) -> None:
        self._crew, self._stack = crew, stack
        self._begun = [_Begun() for _ in crew]
        self._lock = threading.Lock()
        self._fault: PotstillError | None = None
        self._threads = [threading.Thread(target=self._read, args=(n,), daemon=True) for n in range(len(crew))]
        for thread in self._threads:
            thread.start()

    @classmethod
    def started(cls, engine: EngineSettings, *, num_workers: int) -> WorkerEngines:
        stack = contextlib.ExitStack()
        settings = json.dumps(engine.packed())
        return cls([stack.enter_context(LiveWorker(settings)) for _ in range(num_workers)], stack)

    @property
    def fault(self) -> PotstillError | None:
        return self._fault

    def submit(self, sequence: Sequence[int], done: Done, grew: Grew | None = None) -> None:
        with self._lock:
            number = min(range(len(self._crew)), key=lambda n: len(self._begun[n]))
            if self._begun[number].begin(sequence, done, grew):
                self._crew[number].write(json.dumps(packed(sequence)))

    def withdraw(self, key: int) -> None:
        with self._lock:
            for worker, begun in zip(self._crew, self._begun, strict=True):
                if begun.withdraw(key):
                    worker.write(json.dumps([key]))

    def close(self) -> None:
        with self._lock:
            for worker in self._crew:
                worker.write("[]")
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
        worker, begun = self._crew[number], self._begun[number]
        for line in worker.lines():
            news = json.loads(line)
            if isinstance(news, dict):
                self._tell(number, news)
            else:
                key, *generated = news
                begun.finish(key, partial(take_generated, generated=generated))
        try:
            worker.check()
        except PotstillError as exc:
            self._lose(exc)
        else:
            begun.fail(EnvironmentFault(ENDED))

    def _tell(self, number: int, news: dict[str, Any]) -> None:
        self._begun[number].grow(news["grown"])

    def _lose(self, fault: PotstillError) -> None:
        """A worker ended that should not have: so do all."""
        self._fault = self._fault or fault
        for begun in self._begun:
            begun.fail(fault)
        for worker in self._crew:
            worker.kill()
