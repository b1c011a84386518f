"""Progress as it is shown on a terminal: live bars. Elsewhere `distill.plain_progress` writes lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task as RichTask, TaskID, TextColumn
from rich.text import Text

from distill.plain_progress import Count, facts_text
from distill.printable import printable
from distill.progress import Task


class _DoneColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        count: Count = task.fields["count"]
        return Text("" if count.total is None else f"{count.done:g}/{count.total:g}")


class _PaceColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        count: Count = task.fields["count"]
        return Text(printable(f"{count.pace} {facts_text(count.facts)}"), style="dim")


class BarProgress:
    """Live bars, one a task, gone when the last one is finished."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            _DoneColumn(),
            _PaceColumn(),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def task(self, name: str, total: float | None, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        count = Count(total, done, unit)
        if self._open == 0:
            self._bars.start()
        self._open += 1
        handle = self._bars.add_task(printable(name), total=total, completed=int(done), count=count)
        try:
            yield _BarTask(self._bars, handle, count)
        finally:
            self._bars.remove_task(handle)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()


class _BarTask:
    def __init__(self, bars: Progress, handle: TaskID, count: Count) -> None:
        self._bars = bars
        self._handle = handle
        self._count = count

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self._count.advance(amount, facts)
        self._bars.update(self._handle, completed=self._count.done)
