"""A second try, with the reference as a hint, at questions of which no sample is right.

STaR calls it rationalisation (arXiv 2203.14465, section 3.2): told the answer, a teacher may find the way to it. The
sample belongs to the question as it stands, so the hint is nowhere in the example; curation keeps it only where its
answer is right and it does not speak of the hint. A question whose reference is suspected (its samples agree with each
other, and not with it) gets none: the teacher would be led astray.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from distill.ledger import Ledger
from distill.problems.packed import PackedProblems
from distill.progress import Progress
from distill.protocols import Teacher
from distill.recipe import Recipe
from distill.records import FIRST_HINTED, Problem
from distill.synthesis import hinted
from distill.verify import open_verifier
from distill.verify.audit import Audit
from distill.verify.kept import KeptVerdicts, grading_settings
from distill.wanted import Requests
from pipelines.asking import Asker
from pipelines.rounds import Rounds


class SecondTries:
    """Hinted samples; `ask` makes the ledger hold all that there are to be."""

    def __init__(self, rounds: Rounds, teacher: Teacher, recipe: Recipe, ledger: Ledger, progress: Progress) -> None:
        self._rounds = rounds
        self._teacher = teacher
        self._recipe = recipe
        self._ledger = ledger
        self._progress = progress
        self._num_suspected = 0
        self._asked: tuple[Asker, Requests] | None = None

    def ask(self, judge: Teacher | None = None) -> None:
        """After `rounds` has asked. Does nothing where the recipe wants no hints."""
        hints = self._recipe.generate.hints
        if hints is None:
            return
        unsolved = {
            problem.id: problem for problem in map(self._problem, self._rounds.unsolved()) if _can_hint(problem)
        }
        suspected = self._suspected(unsolved, judge)
        self._num_suspected = len(suspected)
        originals = {hinted(problem).id: name for name, problem in unsolved.items() if name not in suspected}
        problems = PackedProblems(hinted(unsolved[name]) for name in originals.values())
        asker = Asker(
            problems,
            self._teacher,
            self._recipe.generate.sampling,
            self._ledger,
            self._progress,
            belongs_to=lambda problem: originals[problem.id],
        )
        indices = range(FIRST_HINTED, FIRST_HINTED + hints.num_samples)
        requests = Requests(problems, ((number, index) for number in range(len(problems)) for index in indices))
        asker.complete(requests, "generate with hints")
        self._asked = asker, requests

    def keys(self) -> Iterator[str]:
        """Keys of all that the ledger holds of them, problem by problem."""
        if self._asked is not None:
            asker, requests = self._asked
            yield from map(asker.wanted.key, requests.places())

    def counts(self) -> dict[str, int]:
        """Hinted samples, and questions that got none because their references are suspected."""
        if self._asked is None:
            return {}
        return {"hinted": len(self._asked[1]), "not_hinted_suspected": self._num_suspected}

    def _problem(self, number: int) -> Problem:
        return self._rounds.wanted.problems[number]

    def _suspected(self, unsolved: dict[str, Problem], judge: Teacher | None) -> set[str]:
        """Ids of the problems whose wrong answers agree. Their verdicts are known, to the last time-out."""
        config, wanted = self._recipe.verify, self._rounds.wanted
        audit = Audit(unsolved, config)
        with (
            open_verifier(config, judge=judge) as verifier,
            KeptVerdicts(self._ledger, verifier, grading_settings(config, judge)) as kept,
        ):
            for number in self._rounds.unsolved():
                problem = self._problem(number)
                if problem.id not in unsolved:
                    continue
                keys = [wanted.key((number, index)) for index in range(wanted.num_samples[number])]
                traces = list(self._ledger.traces(keys))
                for trace, verdict in zip(traces, kept.grade([(problem, one) for one in traces]), strict=True):
                    audit.add(problem.id, trace.key, verdict.state, verdict.extracted)
        return {suspect.problem_id for suspect in audit.suspects()}


def all_keys(rounds: Rounds, tries: SecondTries) -> Iterator[str]:
    """The order in which traces are exported: by question and sample index, the hinted ones last."""
    return chain(rounds.wanted.keys(), tries.keys())


def _can_hint(problem: Problem) -> bool:
    """An answer can be told; a program would be the whole solution."""
    return problem.answer is not None and problem.grader != "code"
