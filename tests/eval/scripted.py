"""A model that follows a script, a grader without processes, and scoring by them as the eval stage scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.ledger import Ledger
from distill.progress import Progress, silent
from distill.protocols import Teacher, Verifier
from distill.records import Completion, Sampling, ScoreCard, TeacherIdentity, TraceRequest, Verdict
from distill.verify.kept import KeptVerdicts
from eval.answers import LEDGER, KeptAnswers
from eval.harness import Subject, score_model

SUBJECT = Subject("scripted", "base", "qwen2", 10, 10)


class Scripted:
    """Right on samples that `right(question number, sample index)` names; remembers what it was asked."""

    def __init__(self, right) -> None:
        self.right = right
        self.seen: list[TraceRequest] = []
        self.sampling: Sampling | None = None
        self.order: dict[str, int] = {}

    @property
    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(name="s", weights="s", template="s", backend="script", backend_version="0")

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        self.seen, self.sampling = list(requests), sampling
        for request in requests:
            self.order.setdefault(request.problem.id, len(self.order))
        for request in reversed(requests):  # any order is allowed
            right = self.right(self.order[request.problem.id], request.sample_index)
            yield Completion(
                request=request,
                text=self.text(request, right=right),
                finish_reason="stop",
                num_prompt_tokens=1,
                num_tokens=9,
            )

    def text(self, request: TraceRequest, *, right: bool) -> str:
        answer = request.problem.answer if right else f"{request.sample_index}+x^99"
        return f"<think>\nI remember.\n</think>\n\n\\boxed{{{answer}}}"

    def close(self) -> None:
        pass


class Exact:
    """Grades by equality of the boxed text: what these tests ask for, without worker processes."""

    def verify(self, answers) -> Iterator[Verdict]:
        for problem, text, finish in answers:
            extracted = text.rpartition("\\boxed{")[2].removesuffix("}")
            state = "truncated" if finish == "length" else "correct" if extracted == problem.answer else "wrong"
            yield Verdict(state=state, extracted=extracted)

    def close(self) -> None:
        pass


def scored(
    model: Teacher,
    suites: Sequence[str],
    folder: Path,
    *,
    verifier: Verifier | None = None,
    grading: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> tuple[list[ScoreCard], int]:
    """The ScoreCards, and how many samples `folder` did not keep from before."""
    with Ledger.open(folder / LEDGER) as ledger, KeptVerdicts(ledger, verifier or Exact(), grading or {}) as verdicts:
        kept = KeptAnswers(model, ledger, verdicts, progress or silent())
        return score_model(kept, SUBJECT, suites, folder, **asked), kept.num_asked
