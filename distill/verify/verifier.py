"""The `Verifier`: what can be decided by looking is decided here, the rest goes to the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.recipe import VerifyConfig
from distill.records import FinishReason, Problem, Verdict
from distill.verify.choice import grade_choice
from distill.verify.extract import extract_answer
from distill.verify.keeper import Task
from distill.verify.pool import WorkerPool

MAX_ANSWER_CHARS = 20_000  # the longest reference of any family is a tenth of it


class RuleVerifier:
    """Grades by rule. An answer that was cut off is `truncated`, one that is not there is `wrong`."""

    def __init__(self, config: VerifyConfig) -> None:
        self._pool = WorkerPool(
            num_workers=config.num_workers, timeout_s=config.timeout_s, memory_bytes=config.memory_mib << 20
        )

    def verify(self, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        """Yield one verdict an answer, in order. Raises EnvironmentFault where no worker can be started at all."""
        verdicts: list[Verdict | None] = []
        tasks: list[Task] = []
        extracted: list[str | None] = []
        for problem, text, finish_reason in answers:
            answer = extract_answer(text)
            extracted.append(answer)
            verdict = _at_a_glance(problem, answer, finish_reason)
            verdicts.append(verdict)
            if verdict is None and answer is not None:
                tasks.append(_task(problem, answer))
        graded = self._pool.run(tasks)
        for verdict, answer in zip(verdicts, extracted, strict=True):
            if verdict is None:
                state, detail = next(graded)
                verdict = Verdict(state=state, extracted=answer, detail=detail)
            yield verdict

    def close(self) -> None:
        self._pool.close()


def _at_a_glance(problem: Problem, answer: str | None, finish_reason: FinishReason) -> Verdict | None:
    if answer is None:
        if finish_reason == "length":
            return Verdict(state="truncated", detail="cut off before the answer")
        return Verdict(state="wrong", detail="no boxed answer after the reasoning")
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(state="wrong", extracted=answer[:80], detail=f"{len(answer)} characters are no answer")
    if problem.grader == "choice":
        state, detail = grade_choice(problem, answer)
        return Verdict(state=state, extracted=answer, detail=detail)
    if problem.grader == "math" and not problem.answer:
        return Verdict(state="unverifiable", extracted=answer, detail="no reference answer")
    return None


def _task(problem: Problem, answer: str) -> Task:
    return {
        "grader": problem.grader,
        "reference": problem.answer,
        "answer": answer,
        "metadata": problem.metadata if problem.grader == "reasoning_gym" else {},
    }
