"""An engine's sequences have numbers of its own: what is still said of one that was given up is of no other."""

from __future__ import annotations

import contextlib
import io
import json
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from distill.errors import EnvironmentFault
from teacher.backends.native.live import LocalEngine, WorkerEngines
from teacher.backends.native.workers import _write
from teacher.engine.sequence import Sequence
from tests.teacher.http.spelling_teacher import wait_until


class Worker:
    """Stands where a worker process does: remembers what it was told, says what it is asked to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def write(self, line: str) -> None:
        match json.loads(line):
            case {"begin": rows}:
                self.begun += [key for key, *_ in rows]
            case {"cancel": keys}:
                self.cancelled += keys
            case _:
                self._lines.put(None)

    def lines(self) -> Iterator[str]:
        return iter(self._lines.get, None)

    def finish(self, key: int, token: int) -> None:
        done = Sequence(key, [1, 2], max_tokens=3, seed=0, generated_ids=[token], finish_reason="stop")
        written = io.StringIO()
        _write(done, written)
        self._lines.put(written.getvalue())

    def say(self, line: str) -> None:
        self._lines.put(line)

    def check(self) -> None:
        pass

    def kill(self) -> None:
        self._lines.put(None)


def sequence(key: int) -> Sequence[int]:
    return Sequence(key, [1, 2], max_tokens=3, seed=0)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def engines(worker: Worker) -> Iterator[WorkerEngines]:
    engines = WorkerEngines([worker], contextlib.ExitStack())
    yield engines
    engines.close()


def test_a_late_line_of_an_abandoned_run_settles_nothing_that_came_after(
    worker: Worker, engines: WorkerEngines
) -> None:
    abandoned = engines.run([sequence(0), sequence(1)])
    worker.finish(0, 7)
    assert next(abandoned).generated_ids == [7]
    abandoned.close()
    assert worker.cancelled == [1]

    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    new = sequence(1)
    engines.submit(new, outcomes.put)
    worker.finish(1, 8)  # the abandoned run's, on its way when it was given up
    worker.finish(worker.begun[-1], 9)
    assert outcomes.get(timeout=20) is new
    assert (new.key, new.generated_ids) == (1, [9])
    assert len(set(worker.begun)) == 3


def test_a_run_and_what_is_submitted_beside_it_may_have_one_key(worker: Worker, engines: WorkerEngines) -> None:
    run = engines.run([sequence(0), sequence(1)])
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    beside = [sequence(0), sequence(1)]
    cancels = [engines.submit(one, outcomes.put) for one in beside]
    worker.finish(worker.begun[0], 10)
    cancels[1]()
    assert str(outcomes.get(timeout=20)) == "the request was withdrawn"
    with ThreadPoolExecutor(1) as other:
        finished = other.submit(list, run)
        wait_until(lambda: len(worker.begun) == 4)
        for number, token in zip(worker.begun[2:], (20, 21), strict=True):
            worker.finish(number, token)
        rest = finished.result(20)
    assert outcomes.get(timeout=20) is beside[0]
    assert beside[0].generated_ids == [10]
    assert beside[1].generated_ids == []
    assert sorted((one.key, *one.generated_ids) for one in rest) == [(0, 20), (1, 21)]


@pytest.mark.parametrize("line", ["[0, 1]", "{", '{"unheard": 1}'])
def test_what_cannot_be_read_ends_all_and_says_so(worker: Worker, engines: WorkerEngines, line: str) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engines.submit(sequence(0), outcomes.put)
    worker.say(line)
    assert isinstance(outcomes.get(timeout=20), EnvironmentFault)
    assert engines.fault is not None


class Never:
    """Stands where an engine does that is still at its first sequences."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)

    def run(self, sequences: list[Sequence[int]], *, more: Any) -> Iterator[Sequence[int]]:
        running = list(sequences)
        while not self.cancelled:
            running += more()
        yield from (one for one in running if one.key not in self.cancelled)


def test_one_of_three_with_one_key_is_cancelled() -> None:
    local = LocalEngine(Never())  # type: ignore[arg-type]
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    three = [sequence(5) for _ in range(3)]
    cancels = [local.submit(one, outcomes.put) for one in three]
    cancels[1]()
    assert str(outcomes.get(timeout=20)) == "the request was withdrawn"
    assert {id(outcomes.get(timeout=20)) for _ in range(2)} == {id(three[0]), id(three[2])}
    local.close()
