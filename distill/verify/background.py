"""Grading beside generation: a thread that grades what has come in while the teacher writes the rest.

It may fall behind, and nothing waits for it: an answer that does not fit into its queue, or that is still there at the
end, is graded later, by whoever needs the verdict. Should grading fail, generation goes on, and the fault is met again
where a verdict is needed.
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Self

from distill.errors import PotstillError
from distill.recipe import VerifyConfig
from distill.records import Problem, Trace, Verdict
from distill.verify import open_verifier
from distill.verify.kept import grading_id, grading_settings

MAX_WAITING = 1_024
MAX_BATCH = 256
GRACE_S = 2.0  # for the verdict that is being made when the block ends


class BackgroundGrader:
    """`offer` what arrives, `collect` what is graded; the thread and its workers begin with the first offer."""

    def __init__(self, config: VerifyConfig) -> None:
        self.fault: PotstillError | None = None
        self._config = config
        self._settings = grading_settings(config)
        self._offered: queue.Queue[tuple[Problem, Trace]] = queue.Queue(MAX_WAITING)
        self._made: queue.SimpleQueue[tuple[str, str, Verdict]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def offer(self, problem: Problem, trace: Trace) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grader", daemon=True)
            self._thread.start()
        if self.fault is None and not self._offered.full():  # this thread alone puts anything in
            self._offered.put((problem, trace))

    def collect(self) -> list[tuple[str, str, Verdict]]:
        """`(key, grading, verdict)` of what was graded since the last call, as `Ledger.add_verdicts` takes it."""
        made = []
        while not self._made.empty():
            made.append(self._made.get())
        return made

    def _work(self) -> None:
        try:
            with open_verifier(self._config) as verifier:
                while batch := self._batch():
                    answers = [(problem, trace.text, trace.finish_reason) for problem, trace in batch]
                    for (problem, trace), verdict in zip(batch, verifier.verify(answers), strict=True):
                        self._made.put((trace.key, grading_id(self._settings, problem, trace), verdict))
                        if self._ended.is_set():
                            return
        except PotstillError as exc:
            self.fault = exc

    def _batch(self) -> list[tuple[Problem, Trace]]:
        """Take what waits, or what comes next; nothing when the block has ended."""
        batch: list[tuple[Problem, Trace]] = []
        while not self._ended.is_set() and len(batch) < MAX_BATCH:
            try:
                batch.append(self._offered.get(timeout=0.0 if batch else 0.1))
            except queue.Empty:
                if batch:
                    break
        return batch
