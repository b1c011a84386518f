"""Asking a teacher for what a run wants and the ledger lacks, round by round, with grading in between where it decides.

With a fixed number of samples there is one round, which is graded where hints follow (`pipelines.hints`). With adaptive
sampling a problem gets rounds until `distill.adaptive.wants_more` says no; that looks at whole rounds, so whatever was
interrupted in the middle of one, the next run completes the round and decides the same.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from distill.adaptive import JUDGED, wants_more
from distill.ledger import KEYS_A_QUERY, Ledger
from distill.problems.packed import PackedProblems
from distill.progress import Progress
from distill.protocols import Teacher
from distill.recipe import AdaptiveSampling, Recipe
from distill.teacher_facts import with_teacher_facts
from distill.verify import open_verifier
from distill.verify.kept import KeptVerdicts, grading_settings
from distill.wanted import Requests, chunks
from pipelines.asking import Asker


class Rounds:
    """One run's samples; `ask` makes the ledger hold all that are `wanted`."""

    def __init__(
        self, problems: PackedProblems, teacher: Teacher, recipe: Recipe, ledger: Ledger, progress: Progress
    ) -> None:
        graded = recipe.generate.grade and recipe.verify.judge is None  # a judge has one thread
        grading = recipe.verify if graded else None
        self._asker = Asker(problems, teacher, recipe.generate.sampling, ledger, progress, grading=grading)
        self.wanted = self._asker.wanted
        self._correct, self._judged = (array("I", bytes(4 * len(problems))) for _ in range(2))
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
            of_round = "" if policy is None else f", round {number}"
            self._asker.complete(places, f"generate{of_round}")
            if policy is None and self._recipe.generate.hints is None:
                return
            self._grade(places, f"verify{of_round}", judge)
            if policy is None:
                return
            active = array("I", (problem for problem in active if self._wants_more(problem, policy)))

    def counts(self) -> dict[str, object]:
        """Counts of what was asked for and what came of it; `samples_per_problem`: of how many problems so many.

        `graded`, `right` and `no_answer` are of the samples that are new, as `YieldSoFar` has them.
        """
        histogram = {str(n): count for n, count in sorted(Counter(self.wanted.num_samples).items())}
        counts: dict[str, object] = {"problems": len(self.wanted.problems), "reused": self._asker.reused}
        if self._recipe.generate.adaptive is not None:
            counts["correct"] = sum(self._correct)
        return {**counts, **self._asker.so_far.counts(), "samples_per_problem": histogram}

    def unsolved(self) -> list[int]:
        """Numbers of the problems without a right sample, after `ask` has graded."""
        return [number for number, correct in enumerate(self._correct) if not correct]

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

    def _grade(self, round_: Requests, name: str, judge: Teacher | None) -> None:
        """Count the verdicts of a complete round; those that are not known yet are made now."""
        config = self._recipe.verify
        with (
            open_verifier(config, judge=judge) as verifier,
            KeptVerdicts(self._ledger, verifier, grading_settings(config, judge)) as kept,
            self._progress.task(name, total=len(round_), unit="answers") as plain,
            with_teacher_facts(plain, judge) as task,
        ):
            for chunk in chunks(round_.places(), KEYS_A_QUERY):
                traces = self._asker.traces(chunk)
                problems = (self.wanted.problems[problem] for problem, _ in chunk)
                verdicts = kept.grade(list(zip(problems, traces, strict=True)))
                for (problem, _), verdict in zip(chunk, verdicts, strict=True):
                    self._correct[problem] += verdict.correct
                    self._judged[problem] += verdict.state in JUDGED
                    task.advance(1)
