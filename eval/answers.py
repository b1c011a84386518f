"""A model's graded answers, each asked for once: from the ledger where it has them, else from the model.

A sample's key is the hash of all that can change it (`distill.records.SampleKeys`): the question as it is asked, the
model's weights, template, instruction and engine, the sampling, the seed, the sample's index. Suites, how many samples
they want and how these are graded are no part of it: another suite asks for its own questions alone, sixteen samples
where there were four ask for twelve, another grader asks for none.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distill.errors import DataError, EnvironmentFault
from distill.ledger import Ledger
from distill.ledger_writer import LedgerWriter
from distill.progress import Progress
from distill.protocols import Teacher, Verifier
from distill.records import Completion, Problem, SampleKeys, Sampling, TeacherIdentity, Trace, TraceRequest, Verdict
from distill.teacher_facts import with_teacher_facts
from distill.verify.kept import KeptVerdicts
from eval.tasks.processors import counted

LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class Answer:
    problem: Problem
    trace: Trace
    verdict: Verdict


class NotKept(DataError):
    """A sample that is wanted of a model that is not here."""


class AbsentModel:
    """A `Teacher` in place of the model that wrote what is kept: it writes no more. `where` is named in faults."""

    def __init__(self, identity: TeacherIdentity, where: Path) -> None:
        self.identity = identity
        self._where = where

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        message = f"{len(requests)} samples of {requests[0].problem.source!r} are not kept; run `potstill eval`"
        raise NotKept(message, where=self._where)

    def close(self) -> None:
        pass


class KeptAnswers:
    """One model's answers. Of `num_answers` given so far the ledger did not have `num_asked`."""

    def __init__(self, model: Teacher, ledger: Ledger, verdicts: KeptVerdicts, progress: Progress) -> None:
        self.num_answers = self.num_asked = 0
        self._model = model
        self._ledger = ledger
        self._verdicts = verdicts
        self._progress = progress

    @property
    def verifier(self) -> Verifier:
        """What grades them."""
        return self._verdicts.verifier

    def of(self, requests: Sequence[TraceRequest], sampling: Sampling, title: str) -> list[Answer]:
        """The answers to `requests`, in their order. Whatever ends the call, what had arrived is in the ledger.

        Raises EnvironmentFault for a model that leaves samples out, NotKept for an absent one.
        """
        keys = SampleKeys(self._model.identity, sampling)
        wanted = {keys.of(request.problem.id, request.sample_index): request for request in requests}
        if missing := self._ledger.missing(wanted):
            self._ask({key: wanted[key] for key in missing}, sampling, title, num_wanted=len(wanted))
        traces = self._ledger.traces(wanted)
        asked = [(request.problem, trace) for request, trace in zip(wanted.values(), traces, strict=True)]
        answers = []
        with self._progress.task(f"grade {title}", len(asked), unit="answers") as task:
            for (problem, trace), verdict in zip(asked, self._verdicts.grade(asked), strict=True):
                answers.append(Answer(problem, trace, counted(problem, verdict)))
                task.advance()
        self.num_answers += len(answers)
        return answers

    def _ask(self, missing: Mapping[str, TraceRequest], sampling: Sampling, title: str, *, num_wanted: int) -> None:
        key_of = {(request.problem.id, request.sample_index): key for key, request in missing.items()}
        done, name = num_wanted - len(missing), self._model.identity.name
        with (
            self._progress.task(title, num_wanted, done=done, unit="samples") as plain,
            with_teacher_facts(plain, self._model) as task,
            LedgerWriter(self._ledger) as writer,
            _ended(self._model.generate(list(missing.values()), sampling)) as completions,
        ):
            for completion in completions:
                request = completion.request
                writer.put(Trace.of(completion, key=key_of[request.problem.id, request.sample_index], teacher=name))
                task.advance()
        left = self._ledger.missing(missing)
        self.num_asked += len(missing) - len(left)
        if left:
            raise EnvironmentFault(f"the model left {len(left)} samples out", where=name)


@contextmanager
def _ended(completions: Iterator[Completion]) -> Iterator[Iterator[Completion]]:
    """Whoever leaves the block ends the requests in flight, now and not when the collector comes by."""
    try:
        yield completions
    finally:
        if isinstance(completions, Generator):
            completions.close()
