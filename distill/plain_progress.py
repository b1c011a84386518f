"""Progress as plain lines: what is shown wherever there is no terminal, in a pipe, a log, a launcher's output.

It does not wait for work to move on: a task that is open is heard of while its first step is still being computed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from distill.printable import printable
from distill.progress import Task

# A task is silent for so long at first; one that goes on for hours is, in the end, for MAX_QUIET_S.
QUIET_S = 10.0
MAX_QUIET_S = 60.0
SHARE_OF_ELAPSED = 0.05


def seconds_text(seconds: float) -> str:
    """`42 s`, `3 min 07 s`, `2 h 05 min`; `?` for what is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60:02d} min"


def facts_text(facts: dict[str, str | float]) -> str:
    """`loss=0.3142 lr=0.001`: numbers to four significant digits."""
    return " ".join(
        f"{name}={value if isinstance(value, str | int) else format(value, '.4g')}" for name, value in facts.items()
    )


class Count:
    """The count of one task: done so far, the rate since it began, and how long the rest takes at that rate."""

    def __init__(self, total: float | None, done: float, unit: str) -> None:
        self.total = total
        self.done = done
        self.unit = unit
        self.at_start = done
        self.started = time.monotonic()
        self.facts: dict[str, str | float] = {}

    def advance(self, amount: float, facts: dict[str, str | float]) -> None:
        self.done += amount
        self.facts.update(facts)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        elapsed = self.elapsed_s
        return (self.done - self.at_start) / elapsed if elapsed > 0 else 0.0

    @property
    def pace(self) -> str:
        """`12 samples/s, 3 s left`; `42 s so far` before there is a rate, and where the total is not known."""
        if self.total is None or self.rate <= 0:
            return f"{seconds_text(self.elapsed_s)} so far"
        left = max(0.0, self.total - self.done) / self.rate
        return f"{self.rate:.3g} {self.unit}/s, {seconds_text(left)} left"

    def line(self) -> str:
        parts = [self.pace, facts_text(self.facts)]
        if self.total is not None:
            share = f" ({self.done / self.total:.0%})" if self.total > 0 else ""
            parts.insert(0, f"{self.done:g}/{self.total:g} {self.unit}{share}")
        return ", ".join(part for part in parts if part)


class PlainProgress:
    """A line a task every `quiet_s` seconds, later on more rarely; a task shorter than that says nothing.

    One whose total is not known speaks where nothing else has for so long. So does whatever was opened last, where a
    stage consists of many short tasks.
    """

    def __init__(self, stream: TextIO, *, quiet_s: float = QUIET_S) -> None:
        self._stream = stream
        self._quiet_s = quiet_s
        self._open: list[_PlainTask] = []
        self._lock = threading.Lock()
        self._spoke = 0.0
        self._all_closed = threading.Event()

    @contextmanager
    def task(self, name: str, total: float | None, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        task = _PlainTask(self, name, Count(total, done, unit))
        with self._lock:
            self._open.append(task)
            if len(self._open) == 1:
                self._spoke = task.spoke
                self._all_closed = threading.Event()
                arguments = (self._all_closed,)
                threading.Thread(target=self._beat, args=arguments, name="progress", daemon=True).start()
        try:
            yield task
        finally:
            with self._lock:
                self._open.remove(task)
                if not self._open:
                    self._all_closed.set()

    def _beat(self, all_closed: threading.Event) -> None:
        while not all_closed.wait(self._quiet_s / 10):
            self.speak()

    def speak(self) -> None:
        """Write a line of every task that has been silent for long enough."""
        now = time.monotonic()
        with self._lock:
            due = [one for one in self._open if one.count.total is not None and self._is_due(one, one.spoke, now)]
            if not due and self._open and self._is_due(self._open[0], self._spoke, now):
                due = [self._open[-1]]
            for task in due:
                self._stream.write(f"  {printable(f'{task.name}: {task.count.line()}')}\n")
                self._stream.flush()
                self._spoke = task.spoke = now

    def _is_due(self, task: _PlainTask, spoke: float, now: float) -> bool:
        return now - spoke >= max(self._quiet_s, min(MAX_QUIET_S, SHARE_OF_ELAPSED * task.count.elapsed_s))


class _PlainTask:
    def __init__(self, progress: PlainProgress, name: str, count: Count) -> None:
        self._progress = progress
        self.name = name
        self.count = count
        self.spoke = count.started

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self.count.advance(amount, facts)
        self._progress.speak()
