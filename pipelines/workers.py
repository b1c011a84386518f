"""Work side by side in processes of its own: progress comes back, the first failure ends all, nothing is left running.

Every worker is a fresh Python that takes one job after another, so that importing torch is paid once a worker. Workers
ignore Ctrl-C (the parent ends them) and end themselves when the parent is gone. Jobs must be resumable: ending a worker
is SIGTERM, and what it had under way is the job's own to pick up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from distill.errors import EnvironmentFault, PotstillError
from distill.progress import Progress, Task

Work = Callable[[Any, Progress], None]
GRACE_S = 5.0


def run_side_by_side(
    work: Work,
    jobs: Sequence[tuple[str, Any]],
    num_workers: int,
    *,
    num_threads: int,
    progress: Progress,
    environments: Sequence[Mapping[str, str]] = (),
) -> None:
    """Call `work(job, progress)` for every (name, job), `num_workers` at a time, started in the order given.

    `work` is a function of a module and jobs can be pickled. Each process may use `num_threads` of torch's threads, and
    has the variables of its place in `environments`, if there is one for each (which GPUs are its own, say).
    Raises the first PotstillError of a job as it is, EnvironmentFault for a process that was killed.
    """
    waiting = list(jobs)
    with ExitStack() as stack:
        places = [environments[n] if environments else {} for n in range(min(num_workers, len(jobs)))]
        crew = [_Worker(work, num_threads, progress, stack, place) for place in places]
        for worker in crew:
            worker.start_next(waiting)
        while busy := {worker.connection: worker for worker in crew if worker.job is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                if worker.receive():
                    worker.start_next(waiting)
        for worker in crew:
            worker.dismiss()


class _Worker:
    """The parent's side of one process."""

    def __init__(
        self, work: Work, num_threads: int, progress: Progress, stack: ExitStack, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.progress = progress
        self.tasks: dict[int, tuple[Task, ExitStack]] = {}
        self.job: str | None = None
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(work, theirs, num_threads, environment), daemon=True
        )
        with _without_main():
            self.process.start()
        theirs.close()
        stack.callback(self.end)

    def start_next(self, waiting: list[tuple[str, Any]]) -> None:
        self.job = None
        if waiting:
            self.job, job = waiting.pop(0)
            self.connection.send(job)

    def receive(self) -> bool:
        """Take one message; True where the job is finished."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError) as exc:
            self.process.join(GRACE_S)
            raise EnvironmentFault(
                f"its process ended with exit code {self.process.exitcode} (out of memory?); the same command resumes",
                where=self.job,
            ) from exc
        if kind == "open":
            number, arguments, keywords = content
            inner = ExitStack()
            self.tasks[number] = inner.enter_context(self.progress.task(*arguments, **keywords)), inner
        elif kind == "advance":
            number, amount, facts = content
            self.tasks[number][0].advance(amount, **facts)
        elif kind == "close":
            self.tasks.pop(content[0])[1].close()
        elif kind == "failed":
            raise content[0]
        return bool(kind == "done")

    def dismiss(self) -> None:
        """Let a process that waits for a job tidy up (its semaphores, say) and end by itself."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(GRACE_S)

    def end(self) -> None:
        for _, inner in self.tasks.values():
            inner.close()
        self.process.terminate()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


class _Relay:
    """Progress in a worker: every call becomes a message. Tasks are advanced from several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lock = threading.Lock()
        self.opened = 0

    @contextmanager
    def task(self, name: str, total: float | None, *, done: float = 0, unit: str = "it") -> Iterator[Task]:
        self.opened += 1
        number = self.opened
        self.send("open", number, (name, total), {"done": done, "unit": unit})
        try:
            yield _RelayedTask(self, number)
        finally:
            self.send("close", number)

    def send(self, *message: object) -> None:
        with self.lock:
            self.connection.send(message)


class _RelayedTask:
    def __init__(self, relay: _Relay, number: int) -> None:
        self.relay = relay
        self.number = number

    def advance(self, amount: float = 1, **facts: str | float) -> None:
        self.relay.send("advance", self.number, amount, facts)


@contextmanager
def _without_main() -> Iterator[None]:
    """A spawned process runs the program that spawned it once more, for its definitions. Ours are all in modules, and a
    person's script must not start its run again in every worker."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(work: Work, connection: Connection, num_threads: int, environment: Mapping[str, str]) -> None:
    """The worker's side: jobs in, messages out, until there are no more or the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"OMP_NUM_THREADS": str(num_threads), **environment}
    import torch

    torch.set_num_threads(num_threads)
    while True:
        job = connection.recv()
        if job is None:
            return
        try:
            work(job, _Relay(connection))
        except PotstillError as exc:
            connection.send(("failed", exc))
            return
        except Exception as exc:  # noqa: BLE001 - a defect of ours: the parent shows it as if it had happened there
            text = "".join(traceback.format_exception(exc))
            connection.send(("failed", RuntimeError(f"in a worker process:\n{text}")))
            return
        connection.send(("done",))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
