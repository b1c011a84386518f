"""Progress that keeps what it is told, task by task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from distill.progress import Task


class RecordedProgress:
    """`done` is how far each task came, `facts` the last ones that it showed, `totals` what it was opened with."""

    def __init__(self) -> None:
        self.totals: dict[str, float | None] = {}
        self.done: Counter[str] = Counter()
        self.facts: dict[str, dict[str, str | float]] = defaultdict(dict)

    @contextmanager
    def task(self, name: str, total: float | None, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        self.totals[name] = total
        yield _RecordedTask(self, name)


class _RecordedTask:
    def __init__(self, progress: RecordedProgress, name: str) -> None:
        self._progress = progress
        self._name = name

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self._progress.done[self._name] += amount
        self._progress.facts[self._name].update(facts)
