"""Asking a teacher for what a run wants and the ledger lacks, round by round, with grading in between where it decides.

With a fixed number of samples there is one round. With adaptive sampling a problem gets rounds until
`distill.adaptive.wants_more` says no; that looks at whole rounds, so whatever was interrupted in the middle of one, the
next run completes the round and decides the same.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from distill.adaptive import JUDGED, wants_more
from distill.errors import EnvironmentFault
from distill.ledger import KEYS_A_QUERY, Ledger
from distill.problems.packed import PackedProblems
from distill.progress import Progress, Task
from distill.protocols import Teacher
from distill.recipe import AdaptiveSampling, Recipe
from distill.records import Completion, Problem, Trace, Verdict
from distill.teacher_facts import with_teacher_facts
from distill.verify import open_verifier
from distill.verify.background import BackgroundGrader
from distill.verify.extract import answer_of
from distill.verify.kept import KeptVerdicts, grading_settings
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
        elif answer_of(trace.text, problem.grader) is None:
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


class Rounds:
    """One run's samples; `ask` makes the ledger hold all that are `wanted`."""

    def __init__(
        self, problems: PackedProblems, teacher: Teacher, recipe: Recipe, ledger: Ledger, progress: Progress
    ) -> None:
        self.wanted = WantedSamples(problems, teacher.identity, recipe.generate.sampling)
        self.reused = 0
        self.so_far = YieldSoFar()
        self._correct, self._judged = (array("I", bytes(4 * len(problems))) for _ in range(2))
        self._teacher = teacher
        self._recipe = recipe
        self._ledger = ledger
        self._progress = progress

    def ask(self, judge: Teacher | None = None) -> None:
        """Raises EnvironmentFault for a teacher that leaves samples out; what had arrived is in the ledger.

        `judge` grades between rounds where the recipe names one.
        """
        policy = self._recipe.generate.adaptive
        active: Iterable[int] = range(len(self.wanted.problems))
        number = 0
        while active:
            number += 1
            places = self._next_round(active)
            self._complete(places, "generate" if policy is None else f"generate, round {number}")
            if policy is None:
                return
            self._grade(places, number, judge)
            active = array("I", (problem for problem in active if self._wants_more(problem, policy)))

    def counts(self) -> dict[str, object]:
        """Counts of what was asked for and what came of it; `samples_per_problem`: of how many problems so many.

        `graded`, `right` and `no_answer` are of the samples that are new, as `YieldSoFar` has them.
        """
        histogram = {str(n): count for n, count in sorted(Counter(self.wanted.num_samples).items())}
        counts: dict[str, object] = {"problems": len(self.wanted.problems), "reused": self.reused}
        if self._recipe.generate.adaptive is not None:
            counts["correct"] = sum(self._correct)
        return {**counts, **self.so_far.counts(), "samples_per_problem": histogram}

    def _next_round(self, active: Iterable[int]) -> Requests:
        config = self._recipe.generate
        limit = config.num_samples if config.adaptive is None else config.adaptive.max_samples
        round_ = Requests(self.wanted.problems)
        for problem in active:
            begin = self.wanted.num_samples[problem]
            end = min(begin + config.num_samples, limit)
            for index in range(begin, end):
                round_.append((problem, index))
            self.wanted.num_samples[problem] = end
        return round_

    def _wants_more(self, problem: int, policy: AdaptiveSampling) -> bool:
        asked = self.wanted.num_samples[problem]
        return wants_more(policy, correct=self._correct[problem], judged=self._judged[problem], asked=asked)

    def _complete(self, round_: Requests, name: str) -> None:
        missing = Requests(self.wanted.problems, self._missing(round_.places()))
        done = len(round_) - len(missing)
        self.reused += done
        if not missing:
            return
        with (
            self._progress.task(name, total=len(round_), done=done, unit="samples") as plain,
            with_teacher_facts(plain, self._teacher) as task,
            BackgroundGrader(self._recipe.verify) as grader,
        ):
            self._collect(missing, task, grader)
        if left := sum(1 for _ in self._missing(missing.places())):
            raise EnvironmentFault(f"the teacher left {left} samples out", where=self._recipe.teacher.model)

    def _missing(self, places: Iterator[Place]) -> Iterator[Place]:
        for chunk in chunks(places, KEYS_A_QUERY):
            keys = [self.wanted.key(place) for place in chunk]
            present = self._ledger.present(keys)
            yield from (place for place, key in zip(chunk, keys, strict=True) if key not in present)

    def _collect(self, requests: Requests, task: Task, grader: BackgroundGrader) -> None:
        """Ask for all `requests`; whatever ends the loop, what had arrived is in the ledger afterwards."""
        waiting: list[Trace] = []
        started = flushed = time.monotonic()
        tokens = 0
        stream = self._teacher.generate(requests, self._recipe.generate.sampling)
        try:
            for completion in stream:
                trace = self._trace(completion)
                waiting.append(trace)
                if self._recipe.generate.grade and self._recipe.verify.judge is None:  # a judge has one thread
                    grader.offer(completion.request.problem, trace)
                self.so_far.add(completion.request.problem, trace)
                tokens += completion.num_tokens
                now = time.monotonic()
                if len(waiting) >= FLUSH_SAMPLES or now - flushed > FLUSH_S:
                    self._ledger.add(waiting)
                    waiting, flushed = [], now
                    self._keep(grader.collect())
                pace: dict[str, str | float] = {"tokens_per_s": round(tokens / max(now - started, 1e-9))}
                task.advance(1, tokens=tokens, **pace, **self.so_far.facts())
        finally:
            self._ledger.add(waiting)
            self._keep(grader.collect())
            if isinstance(stream, Generator):
                stream.close()  # ends the requests in flight now, not when the collector comes by

    def _keep(self, verdicts: Sequence[tuple[str, str, Verdict]]) -> None:
        self._ledger.add_verdicts(verdicts)
        self.so_far.grade(verdicts)

    def _trace(self, completion: Completion) -> Trace:
        request = completion.request
        key = self.wanted.key_of(request.problem.id, request.sample_index)
        return Trace.of(completion, key=key, teacher=self._teacher.identity.name)

    def _grade(self, round_: Requests, number: int, judge: Teacher | None) -> None:
        """Count the verdicts of a complete round; those that are not known yet are made now."""
        config = self._recipe.verify
        with (
            open_verifier(config, judge=judge) as verifier,
            KeptVerdicts(self._ledger, verifier, grading_settings(config, judge)) as kept,
            self._progress.task(f"verify, round {number}", total=len(round_), unit="answers") as plain,
            with_teacher_facts(plain, judge) as task,
        ):
            for chunk in chunks(round_.places(), KEYS_A_QUERY):
                traces = self._ledger.traces([self.wanted.key(place) for place in chunk])
                problems = (self.wanted.problems[problem] for problem, _ in chunk)
                verdicts = kept.grade(list(zip(problems, traces, strict=True)))
                for (problem, _), verdict in zip(chunk, verdicts, strict=True):
                    self._correct[problem] += verdict.correct
                    self._judged[problem] += verdict.state in JUDGED
                    task.advance(1)
