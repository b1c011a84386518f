"""Worker processes that grade, and that may hang or die: one hanging answer costs its own verdict and nothing else.

A worker (`distill.verify.worker`) takes a chunk of answers and reports each as it is done, so the parent knows which
answer a silent worker is at. That one gets the verdict `timeout` when its time is up and the worker is killed; the rest
of the chunk goes to a fresh worker. An answer at which a worker dies is tried once more, then it is an `infra_error`.
General process pools hand a chunk one deadline, or every answer the price of a round trip: hence this one.

Workers are new interpreters, not forks (the parent may hold torch and its threads). They talk JSON over pipes: a parent
that unpickles what a worker says would trust the text that the worker has evaluated. They stand in a session of their
own, so Ctrl-C reaches the parent alone; a worker whose parent is gone ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from distill.errors import EnvironmentFault
from distill.records import VerdictState

Task = dict[str, Any]
Result = tuple[VerdictState, str]

MAX_CHUNK = 64
START_S = 120.0  # for imports and for data sets that take their time to be made; never counted to an answer
MAX_FAILED_STARTS = 3
ROOT = Path(__file__).parents[2]


class Worker:
    """One child process and the chunk it works on."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in kill
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distill.verify.worker", repr(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self.out = self._process.stdin, self._process.stdout
        self._rest = b""
        self.proved = False  # has it ever been ready?
        self.ready = False
        self.chunk: deque[int] = deque()
        self.deadline = float("inf")

    def give(self, chunk: Sequence[int], tasks: Sequence[Task]) -> None:
        self.chunk = deque(chunk)
        self.ready = False
        self.deadline = time.monotonic() + START_S
        with contextlib.suppress(BrokenPipeError):  # it has died: reading from it says so
            self._in.write(json.dumps([tasks[index] for index in chunk]).encode() + b"\n")
            self._in.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None where the worker is gone or talks nonsense."""
        data = os.read(self.out.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def heard(self) -> None:
        """It has reported: the answer it is at now has its whole time before it."""
        self.deadline = time.monotonic() + self._timeout_s if self.chunk else float("inf")

    def kill(self, *, grace_s: float = 0.0) -> str:
        """End it, unless it ends by itself within `grace_s`; say how it ended and what it last complained of."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._process.kill()
        code = self._process.wait()
        for stream in (self._in, self.out):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._stderr.seek(0)
        said = self._stderr.read()[-2_000:].decode(errors="replace").split("\n")
        self._stderr.close()
        last = next((line for line in reversed(said) if line.strip()), "")
        return f"signal {-code}" if code < 0 else f"exit {code}: {last[:200]}"


class WorkerPool:
    """`run` any number of times, one run at a time; workers live on between runs."""

    def __init__(self, *, num_workers: int, timeout_s: float) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield one result a task, in order. Abandoning the iterator leaves the pool usable."""
        size = max(1, min(MAX_CHUNK, len(tasks) // (4 * self._num_workers)))
        waiting = deque(list(range(start, min(start + size, len(tasks)))) for start in range(0, len(tasks), size))
        results: dict[int, Result] = {}
        deaths: dict[int, int] = {}
        try:
            for index in range(len(tasks)):
                while index not in results:
                    self._hand_out(waiting, tasks)
                    self._listen(waiting, results, deaths)
                yield results.pop(index)
        finally:
            for worker in [worker for worker in self._workers if worker.chunk]:
                self._drop(worker)  # its reports would be taken for the next run's

    def close(self) -> None:
        for worker in list(self._workers):
            self._drop(worker)
        self._selector.close()

    def _hand_out(self, waiting: deque[list[int]], tasks: Sequence[Task]) -> None:
        busy = sum(bool(worker.chunk) for worker in self._workers)
        while len(self._workers) < min(self._num_workers, busy + len(waiting)):
            worker = Worker(self._timeout_s)
            self._workers.append(worker)
            self._selector.register(worker.out, selectors.EVENT_READ, worker)
        for worker in self._workers:
            if not worker.chunk and waiting:
                worker.give(waiting.popleft(), tasks)

    def _listen(self, waiting: deque[list[int]], results: dict[int, Result], deaths: dict[int, int]) -> None:
        """Wait for the next report, death or deadline, and deal with all that has come."""
        first = min(worker.deadline for worker in self._workers)
        for key, _ in self._selector.select(max(0.0, first - time.monotonic()) + 0.001):
            worker: Worker = key.data
            messages = worker.read()
            if messages is None:
                self._bury(worker, waiting, results, deaths)
                continue
            for message in messages:
                self._take(worker, message, results)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.chunk and worker.deadline < now]:
            if not worker.ready:
                self._bury(worker, waiting, results, deaths)
                continue
            results[worker.chunk.popleft()] = ("timeout", f"not graded within {self._timeout_s:g} s")
            self._drop(worker, waiting)

    def _take(self, worker: Worker, message: dict[str, Any], results: dict[int, Result]) -> None:
        if "ready" in message:
            worker.ready = worker.proved = True
            self._failed_starts = 0
        elif worker.chunk:
            results[worker.chunk.popleft()] = (message["state"], message["detail"])
        worker.heard()

    def _bury(
        self, worker: Worker, waiting: deque[list[int]], results: dict[int, Result], deaths: dict[int, int]
    ) -> None:
        """A worker has died, or never got ready: its current answer gets a second try, then the verdict infra_error."""
        first = worker.chunk[0] if worker.chunk else None
        how = self._drop(worker, waiting, grace_s=1.0)
        if not worker.proved:  # no answer's fault
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise EnvironmentFault(f"grading workers do not start ({how})", where="distill.verify")
            return
        if first is None:
            return
        rest = waiting.popleft()[1:]
        if rest:
            waiting.appendleft(rest)
        deaths[first] = deaths.get(first, 0) + 1
        if deaths[first] > 1:
            results[first] = ("infra_error", f"the worker died twice ({how})")
        else:
            waiting.appendleft([first])

    def _drop(self, worker: Worker, waiting: deque[list[int]] | None = None, *, grace_s: float = 0.0) -> str:
        self._selector.unregister(worker.out)
        self._workers.remove(worker)
        if waiting is not None and worker.chunk:
            waiting.appendleft(list(worker.chunk))
        worker.chunk.clear()
        return worker.kill(grace_s=grace_s)


def _environment() -> dict[str, str]:
    """This process's environment, with this package importable and one thread a worker."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
