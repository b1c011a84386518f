"""Progress as it is shown: bars on a terminal, a plain line now and then everywhere else.

Both implement `distill.progress.Progress` and write to the stream that they are given; the command line chooses one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from distill.progress import Task

QUIET_S = 10.0


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


class _Count:
    """The count of one task: done so far, the rate since it began, and how long the rest takes at that rate."""

    def __init__(self, total: float, done: float) -> None:
        self.total = total
        self.done = done
        self.at_start = done
        self.started = time.monotonic()
        self.facts: dict[str, str | float] = {}

    def advance(self, amount: float, facts: dict[str, str | float]) -> None:
        self.done += amount
        self.facts.update(facts)

    @property
    def rate(self) -> float:
        elapsed = time.monotonic() - self.started
        return (self.done - self.at_start) / elapsed if elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.total - self.done) / self.rate if self.rate > 0 else math.inf


class PlainProgress:
    """At most one line a task every `quiet_s` seconds; a task shorter than that says nothing."""

    def __init__(self, stream: TextIO, *, quiet_s: float = QUIET_S) -> None:
        self._stream = stream
        self._quiet_s = quiet_s

    @contextmanager
    def task(self, name: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        yield _PlainTask(self._stream, self._quiet_s, name, unit, _Count(total, done))


class _PlainTask:
    def __init__(self, stream: TextIO, quiet_s: float, name: str, unit: str, count: _Count) -> None:
        self._stream = stream
        self._quiet_s = quiet_s
        self._name = name
        self._unit = unit
        self._count = count
        self._spoke = time.monotonic()

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        count = self._count
        count.advance(amount, facts)
        if time.monotonic() - self._spoke < self._quiet_s:
            return
        self._spoke = time.monotonic()
        share = f" ({count.done / count.total:.0%})" if count.total > 0 else ""
        parts = [
            f"{count.done:g}/{count.total:g} {self._unit}{share}",
            f"{count.rate:.3g} {self._unit}/s",
            f"{seconds_text(count.seconds_left)} left",
            facts_text(count.facts),
        ]
        self._stream.write(f"  {self._name}: {', '.join(part for part in parts if part)}\n")
        self._stream.flush()


class _RateColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        count: _Count = task.fields["count"]
        rate = f"{count.rate:.3g} {task.fields['unit']}/s"
        return Text(f"{rate}, {seconds_text(count.seconds_left)} left {facts_text(count.facts)}", style="dim")


class BarProgress:
    """Live bars, one a task, gone when the last one is finished."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:g}/{task.total:g}"),
            _RateColumn(),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def task(self, name: str, total: float, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        count = _Count(total, done)
        if self._open == 0:
            self._bars.start()
        self._open += 1
        handle = self._bars.add_task(name, total=total, completed=int(done), count=count, unit=unit)
        try:
            yield _BarTask(self._bars, handle, count)
        finally:
            self._bars.remove_task(handle)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()


class _BarTask:
    def __init__(self, bars: Progress, handle: TaskID, count: _Count) -> None:
        self._bars = bars
        self._handle = handle
        self._count = count

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self._count.advance(amount, facts)
        self._bars.update(self._handle, completed=self._count.done)
