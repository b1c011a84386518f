"""Engines that stay: sequences join their batches as they come, which is what a server needs.

`LocalEngine` runs one on a thread of this process; `WorkerEngines` one a core, each in a process of its own (for why,
see `teacher.backends.workers`), and gives each sequence to the one that has fewest. Both call back from a thread of
theirs.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from distill.errors import EnvironmentFault, PotstillError
from teacher.backends.workers import LiveWorker
from teacher.serve.engine import Draw, Engine
from teacher.serve.loop import EngineLoop, Job
from teacher.serve.sequence import Sequence

Done = Callable[[Sequence[int] | PotstillError], None]
ENDED = "the engine has ended"


class LiveEngine(Protocol):
    def submit(self, sequence: Sequence[int], draw: Draw, done: Done) -> None:
        """Begin a sequence. `done` is called once, with it when it is finished, or with what went wrong."""
        ...

    def close(self) -> None:
        """Finish what was begun, and end."""
        ...


class _Begun:
    """Sequences under way, each with its callback; settled once, whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[int, tuple[Sequence[int], Done]] = {}
        self._fault: PotstillError | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    def begin(self, sequence: Sequence[int], done: Done) -> bool:
        with self._lock:
            if self._fault is None:
                self._by_key[sequence.key] = sequence, done
                return True
        done(self._fault)
        return False

    def finish(self, key: int) -> tuple[Sequence[int], Done]:
        with self._lock:
            return self._by_key.pop(key)

    def fail(self, fault: PotstillError) -> None:
        """Everything under way, and all that is begun from now on."""
        with self._lock:
            self._fault = fault
            left, self._by_key = list(self._by_key.values()), {}
        for _, done in left:
            done(fault)


class LocalEngine:
    def __init__(self, engine: Engine) -> None:
        self._begun = _Begun()
        self._jobs: queue.SimpleQueue[Job[int] | None] = queue.SimpleQueue()
        self._loop = EngineLoop(engine, self._jobs, self._finished)
        self._thread = threading.Thread(target=self._run, name="potstill-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence[int], draw: Draw, done: Done) -> None:
        if self._begun.begin(sequence, done):
            self._jobs.put(Job(sequence, draw))

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

    def _finished(self, sequence: Sequence[int]) -> None:
        _, done = self._begun.finish(sequence.key)
        done(sequence)


class WorkerEngines:
    def __init__(self, folder: Path, *, num_workers: int, batch_size: int, eos_token_ids: frozenset[int]) -> None:
        settings = {"folder": str(folder.resolve()), "batch_size": batch_size, "eos_token_ids": sorted(eos_token_ids)}
        self._stack = contextlib.ExitStack()
        self._crew = [self._stack.enter_context(LiveWorker(json.dumps(settings))) for _ in range(num_workers)]
        self._begun = [_Begun() for _ in self._crew]
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._read, args=(n,), daemon=True) for n in range(num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, sequence: Sequence[int], draw: Draw, done: Done) -> None:
        with self._lock:
            number = min(range(len(self._crew)), key=lambda n: len(self._begun[n]))
            if self._begun[number].begin(sequence, done):
                self._crew[number].send(sequence, draw)

    def close(self) -> None:
        for worker in self._crew:
            worker.end()
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def _read(self, number: int) -> None:
        worker, begun = self._crew[number], self._begun[number]
        for key, generated_ids, finish_reason, logprobs in worker.finished():
            sequence, done = begun.finish(key)
            sequence.generated_ids, sequence.finish_reason, sequence.logprobs = generated_ids, finish_reason, logprobs
            done(sequence)
        fault: PotstillError = EnvironmentFault(ENDED)
        try:
            worker.check()
        except EnvironmentFault as exc:
            fault = exc
        begun.fail(fault)
