"""Facts of a teacher about its work, shown beside a progress bar, also while no sample is finished.

An answer of 32,768 tokens can take an hour: until the first one is there the bar would stand still and say nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distill.progress import Task
from distill.protocols import Reporting, Teacher

BEAT_S = 1.0


class _TaskWithFacts:
    """A task that two threads advance."""

    def __init__(self, task: Task, teacher: Teacher | None) -> None:
        self._task = task
        self._teacher = teacher if isinstance(teacher, Reporting) else None
        self._lock = threading.Lock()

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        said: dict[str, str | float] = self._teacher.facts() if self._teacher is not None else {}
        with self._lock:
            self._task.advance(amount, **(facts | said))


@contextmanager
def with_teacher_facts(task: Task, teacher: Teacher | None, *, beat_s: float = BEAT_S) -> Iterator[Task]:
    """Yield `task` with the facts of a `Reporting` teacher, if that is one, beside its own, renewed every `beat_s`."""
    shown = _TaskWithFacts(task, teacher)
    if not isinstance(teacher, Reporting):
        yield shown
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(beat_s):
            shown.advance(0)

    thread = threading.Thread(target=beat, name="teacher-facts", daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        ended.set()
        thread.join()
