"""Asking a teacher for the samples that a ledger lacks: what arrives is stored at once, and graded beside it.

Whatever ends the asking, what had arrived is in the ledger afterwards, and is not asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from distill.errors import EnvironmentFault
from distill.ledger import KEYS_A_QUERY, Ledger
from distill.problems.packed import PackedProblems
from distill.progress import Progress, Task
from distill.protocols import Teacher
from distill.recipe import VerifyConfig
from distill.records import Completion, Problem, Sampling, Trace, Verdict
from distill.teacher_facts import with_teacher_facts
from distill.verify.background import BackgroundGrader
from distill.verify.extract import answer_of
from distill.wanted import Place, Requests, WantedSamples, chunks

FLUSH_SAMPLES = 64
FLUSH_S = 5.0


@dataclass
class YieldSoFar:
    """What came of the samples of this run, as far as it is known while the teacher writes on.

    Samples that an earlier run had left are not counted, nor verdicts that are still to be made.
    """

    num_graded: int = 0
    num_right: int = 0
    num_cut_off: int = 0
    num_unanswered: int = 0

    def add(self, problem: Problem, trace: Trace) -> None:
        if trace.finish_reason == "length":
            self.num_cut_off += 1
        elif problem.grader != "none" and answer_of(trace.text, problem.grader) is None:
            self.num_unanswered += 1

    def grade(self, verdicts: Sequence[tuple[str, str, Verdict]]) -> None:
        self.num_graded += len(verdicts)
        self.num_right += sum(verdict.correct for _, _, verdict in verdicts)

    def facts(self) -> dict[str, str | float]:
        right = {"right": f"{self.num_right}/{self.num_graded}"} if self.num_graded else {}
        return right | {"cut_off": self.num_cut_off, "no_answer": self.num_unanswered}

    def counts(self) -> dict[str, int]:
        graded = {"graded": self.num_graded, "right": self.num_right} if self.num_graded else {}
        return graded | {"no_answer": self.num_unanswered}


class Asker:
    """Asks `teacher` for samples of `problems` and keeps them in `ledger`; owns neither.

    With `grading` samples are graded while the teacher writes. `belongs_to` is the id of the problem that a sample
    stands for, where that is not the one that was asked.
    """

    def __init__(
        self,
        problems: PackedProblems,
        teacher: Teacher,
        sampling: Sampling,
        ledger: Ledger,
        progress: Progress,
        *,
        grading: VerifyConfig | None = None,
        belongs_to: Callable[[Problem], str] = lambda problem: problem.id,
    ) -> None:
        self.wanted = WantedSamples(problems, teacher.identity, sampling)
        self.reused = 0
        self.so_far = YieldSoFar()
        self._teacher = teacher
        self._sampling = sampling
        self._ledger = ledger
        self._progress = progress
        self._grading = grading
        self._belongs_to = belongs_to

    def complete(self, requests: Requests, name: str) -> None:
        """Make the ledger hold all that are requested.

        Raises EnvironmentFault for a teacher that leaves samples out; what had arrived is in the ledger.
        """
        missing = Requests(self.wanted.problems, self._missing(requests.places()))
        done = len(requests) - len(missing)
        self.reused += done
        if not missing:
            return
        with (
            self._progress.task(name, total=len(requests), done=done, unit="samples") as plain,
            with_teacher_facts(plain, self._teacher) as task,
        ):
            if self._grading is None:
                self._collect(missing, task, None)
            else:
                with BackgroundGrader(self._grading) as grader:
                    self._collect(missing, task, grader)
        if left := sum(1 for _ in self._missing(missing.places())):
            raise EnvironmentFault(f"the teacher left {left} samples out", where=self._teacher.identity.name)

    def traces(self, places: Sequence[Place]) -> Iterator[Trace]:
        """The samples at these places, which are in the ledger, in their order."""
        return self._ledger.traces([self.wanted.key(place) for place in places])

    def _missing(self, places: Iterator[Place]) -> Iterator[Place]:
        for chunk in chunks(places, KEYS_A_QUERY):
            keys = [self.wanted.key(place) for place in chunk]
            present = self._ledger.present(keys)
            yield from (place for place, key in zip(chunk, keys, strict=True) if key not in present)

    def _collect(self, requests: Requests, task: Task, grader: BackgroundGrader | None) -> None:
        """Ask for all `requests`; whatever ends the loop, what had arrived is in the ledger afterwards."""
        waiting: list[Trace] = []
        started = flushed = time.monotonic()
        tokens = 0
        stream = self._teacher.generate(requests, self._sampling)
        try:
            for completion in stream:
                trace = self._trace(completion)
                waiting.append(trace)
                if grader is not None:
                    grader.offer(completion.request.problem, trace)
                self.so_far.add(completion.request.problem, trace)
                tokens += completion.num_tokens
                now = time.monotonic()
                if len(waiting) >= FLUSH_SAMPLES or now - flushed > FLUSH_S:
                    self._ledger.add(waiting)
                    waiting, flushed = [], now
                    self._keep(grader)
                pace: dict[str, str | float] = {"tokens_per_s": round(tokens / max(now - started, 1e-9))}
                task.advance(1, tokens=tokens, **pace, **self.so_far.facts())
        finally:
            self._ledger.add(waiting)
            self._keep(grader)
            if isinstance(stream, Generator):
                stream.close()  # ends the requests in flight now, not when the collector comes by

    def _keep(self, grader: BackgroundGrader | None) -> None:
        if grader is not None:
            verdicts = grader.collect()
            self._ledger.add_verdicts(verdicts)
            self.so_far.grade(verdicts)

    def _trace(self, completion: Completion) -> Trace:
        request = completion.request
        key = self.wanted.key_of(request.problem.id, request.sample_index)
        stands_for = self._belongs_to(request.problem)
        return Trace.of(completion, key=key, teacher=self._teacher.identity.name, problem_id=stands_for)
