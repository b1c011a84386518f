"""Progress that a person can read: what is done, how fast, how long it still takes.

Stages report to a `Progress`; only the command line decides what it looks like. `silent()` swallows everything, which
is what library users and tests get unless they ask for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    def advance(self, amount: float = 1, **facts: str | float) -> None:
        """Move on by `amount` of the total; `facts` are shown beside the bar (`loss=0.31`)."""
        ...


class Progress(Protocol):
    def task(
        self, name: str, total: float | None, *, done: float = 0, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        """A context manager that yields a Task; `done` is what an earlier run had finished already.

        `total` None: how much there is to do is not known, only that something is done (weights are read, say).
        """
        ...


class _SilentTask:
    def advance(self, amount: float = 1, **facts: str | float) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, name: str, total: float | None, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        yield _SilentTask()


def silent() -> Progress:
    return _Silent()
