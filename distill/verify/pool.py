"""Worker processes that grade, and that may hang or die: one hanging answer costs its own verdict and nothing else.

A worker is a keeper and the grader that it forks for a chunk of answers (`distill.verify.worker`). The grader reports
each answer as it is done, so it is known which one a silent grader is at. That one gets the verdict `timeout` when its
time is up and the grader is killed; the rest of the chunk goes to the next. An answer at which a grader dies is tried
once more, then it is an `infra_error`; so is one whose grader reports what is no verdict. A keeper that dies, or does
not get rid of its grader, is killed with all it has and replaced: there are always as many as were asked for.
General process pools hand a chunk one deadline, or every answer the price of a round trip: hence this one.

Keepers are new interpreters, not forks (the parent may hold torch and its threads). All talk JSON over pipes: a parent
that unpickles what a grader says would trust the text that the grader has evaluated. Each stands in a session of its
own, so Ctrl-C reaches the parent alone.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from distill.errors import EnvironmentFault
from distill.records import VerdictState
from distill.verify.keeper import Keeper, Task

Result = tuple[VerdictState, str]

MAX_CHUNK = 64
MAX_FAILED_STARTS = 3
MAX_DEATHS = 2  # of graders at one answer
MAX_REFUSED = 8  # forks in a row that the system refuses
REST_S = 0.25  # after a refused fork, twice as long each time
STATES = frozenset(get_args(VerdictState))


class WorkerPool:
    """`run` any number of times, one run at a time; workers live on between runs.

    `timeout_s` is the time of one answer, `memory_bytes` what its grader may take beside what it starts with.
    """

    def __init__(self, *, num_workers: int, timeout_s: float, memory_bytes: int) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._workers: list[Keeper] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = self._refused = 0
        self._waiting: deque[list[int]] = deque()
        self._results: dict[int, Result] = {}
        self._deaths: dict[int, int] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids of the keepers."""
        return [worker.pid for worker in self._workers]

    def run(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield one result a task, in order. Abandoning the iterator leaves the pool usable.

        Raises EnvironmentFault where no worker can be started, or the system goes on refusing processes.
        """
        size = max(1, min(MAX_CHUNK, len(tasks) // (4 * self._num_workers)))
        chunks = (list(range(start, min(start + size, len(tasks)))) for start in range(0, len(tasks), size))
        self._waiting, self._results, self._deaths = deque(chunks), {}, {}
        try:
            for index in range(len(tasks)):
                while index not in self._results:
                    self._hand_out(tasks)
                    self._listen()
                yield self._results.pop(index)
        finally:
            self._waiting.clear()
            for worker in self._workers:
                if worker.chunk:
                    worker.abandon()

    def close(self) -> None:
        for worker in list(self._workers):
            self._drop(worker)
        self._selector.close()

    def _hand_out(self, tasks: Sequence[Task]) -> None:
        busy = sum(worker.busy for worker in self._workers)
        while len(self._workers) < min(self._num_workers, busy + len(self._waiting)):
            try:
                worker = Keeper(self._timeout_s, self._memory_bytes)
            except OSError as exc:  # those that are there go on; another is asked for when one of them has reported
                if not self._workers:
                    self._refuse(f"cannot start a process ({exc.strerror})")
                break
            self._workers.append(worker)
            self._selector.register(worker.out, selectors.EVENT_READ, worker)
        now = time.monotonic()
        for worker in self._workers:
            if not worker.busy and self._waiting and worker.resting_until <= now:
                worker.give(self._waiting.popleft(), tasks)

    def _listen(self) -> None:
        """Wait for the next report, death or deadline, and deal with all that has come."""
        for worker in self._workers:
            self._watch_unsent(worker)
        now = time.monotonic()
        wakes = [worker.deadline for worker in self._workers if worker.busy]
        wakes += [worker.resting_until for worker in self._workers if worker.resting_until > now]
        first = min(wakes, default=now + REST_S)
        for key, _ in self._selector.select(max(0.0, first - now) + 0.001):
            worker = key.data
            if worker not in self._workers:
                continue
            if key.fileobj is worker.into:
                worker.send()
                continue
            messages = worker.read()
            if messages is None or not all(self._take(worker, message) for message in messages):
                self._bury(worker)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.busy and worker.deadline < now]:
            if worker.chunk and worker.ready:
                self._results[worker.chunk.popleft()] = ("timeout", f"not graded within {self._timeout_s:g} s")
                self._put_back(worker.abandon())
            else:
                self._bury(worker)

    def _watch_unsent(self, worker: Keeper) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.into)
        if worker.has_more_to_send:
            self._selector.register(worker.into, selectors.EVENT_WRITE, worker)

    def _take(self, worker: Keeper, message: dict[str, Any]) -> bool:
        """Take a message that can come now and return True; a grader that was given up is not listened to."""
        if "ended" in message:
            return worker.busy and self._take_end(worker, str(message["ended"]))
        if not worker.chunk:
            return True
        if "ready" in message:
            worker.ready = worker.proved = True
            self._failed_starts = self._refused = 0
        elif message.get("state") in STATES and isinstance(message.get("detail"), str) and worker.ready:
            self._results[worker.chunk.popleft()] = (message["state"], message["detail"])
        else:
            return False
        worker.heard()
        return True

    def _take_end(self, worker: Keeper, how: str) -> bool:
        """A grader is gone: done, killed by us, dead at an answer, or never there."""
        had_begun, left = worker.ready, worker.at_rest()
        if not left:
            return True
        if had_begun:
            complaint = worker.complaint()
            self._blame(left, f"{how}: {complaint}" if complaint else how)
            return True
        self._put_back(left)
        worker.resting_until = self._refuse(how)
        return True

    def _refuse(self, how: str) -> float:
        """The system gives no process: when to ask again. Raises EnvironmentFault where it has been asked enough."""
        self._refused += 1
        if self._refused >= MAX_REFUSED:
            raise EnvironmentFault(f"graders cannot be started ({how})", where="distill.verify")
        return time.monotonic() + REST_S * (1 << min(self._refused, 5))

    def _bury(self, worker: Keeper) -> None:
        """A keeper has died, hangs, or talks nonsense: it is killed with all it has."""
        had_begun, left = worker.ready, list(worker.chunk)
        how = self._drop(worker, grace_s=1.0 if worker.busy else 0.0)
        if not worker.proved:  # no answer's fault
            self._failed_starts += 1
            self._put_back(left)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise EnvironmentFault(f"grading workers do not start ({how})", where="distill.verify")
        elif left:
            self._blame(left, how) if had_begun else self._put_back(left)

    def _blame(self, left: list[int], how: str) -> None:
        """The first of `left` is what a grader died at: it gets another try by itself, or is given up."""
        first, *rest = left
        self._put_back(rest)
        self._deaths[first] = self._deaths.get(first, 0) + 1
        if self._deaths[first] >= MAX_DEATHS:
            self._results[first] = ("infra_error", f"the grader died {MAX_DEATHS} times ({how})")
        else:
            self._put_back([first])

    def _put_back(self, left: list[int]) -> None:
        if left:
            self._waiting.appendleft(left)

    def _drop(self, worker: Keeper, *, grace_s: float = 0.0) -> str:
        for stream in (worker.out, worker.into):
            with contextlib.suppress(KeyError):
                self._selector.unregister(stream)
        self._workers.remove(worker)
        return worker.kill(grace_s=grace_s)
