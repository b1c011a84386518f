"""The `Verifier`: what can be decided by looking is decided here, the rest goes to the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distill.recipe import VerifyConfig
from distill.records import FinishReason, Problem, Verdict
from distill.verify.choice import grade_choice
from distill.verify.code.grader import CodeGrader
from distill.verify.extract import answer_of, extract_boxes
from distill.verify.keeper import Task
from distill.verify.pool import WorkerPool

FOR_A_JUDGE = "only a judge can tell (verify.judge)"
MAX_ANSWER_CHARS = 20_000  # the longest reference of any family is a tenth of it


class RuleVerifier:
    """Grades by rule. An answer that was cut off is `truncated`, one that is not there is `wrong`."""

    def __init__(self, config: VerifyConfig) -> None:
        self._pool = WorkerPool(
            num_workers=config.num_workers, timeout_s=config.timeout_s, memory_bytes=config.memory_mib << 20
        )
        self._code = CodeGrader(config.code, num_workers=config.num_workers)

    def verify(self, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        """Yield one verdict an answer, in order.

        Raises EnvironmentFault where no worker can be started at all, or where there are programs and no sandbox.
        """
        verdicts: list[Verdict | None] = []
        tasks: list[Task] = []
        programs: list[tuple[dict[str, Any], str]] = []
        extracted: list[str | None] = []
        for problem, text, finish_reason in answers:
            answer = answer_of(text, problem.grader)
            extracted.append(answer)
            verdict = _at_a_glance(problem, answer, finish_reason)
            verdicts.append(verdict)
            if verdict is None and answer is not None:
                if problem.grader == "code":
                    programs.append((problem.metadata, answer))
                else:
                    tasks.append(_task(problem, answer, text))
        graded, run = self._pool.run(tasks), self._code.run(programs)
        for verdict, answer, (problem, _, _) in zip(verdicts, extracted, answers, strict=True):
            if verdict is None:
                state, detail = next(run if problem.grader == "code" else graded)
                verdict = Verdict(state=state, extracted=answer, detail=detail)
            yield verdict

    def close(self) -> None:
        self._code.close()
        self._pool.close()


def _at_a_glance(problem: Problem, answer: str | None, finish_reason: FinishReason) -> Verdict | None:
    if answer is None:
        if finish_reason == "length":
            return Verdict(state="truncated", detail="cut off before the answer")
        if problem.grader == "judge":
            return Verdict(state="unverifiable", detail=FOR_A_JUDGE)
        what = "program in a ```python block" if problem.grader == "code" else "boxed answer"
        return Verdict(state="wrong", detail=f"no {what} after the reasoning")
    if problem.grader == "code":
        return None
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(state="wrong", extracted=answer[:80], detail=f"{len(answer)} characters are no answer")
    if problem.grader == "choice":
        state, detail = grade_choice(problem, answer)
        return Verdict(state=state, extracted=answer, detail=detail)
    if problem.grader == "judge":
        return Verdict(state="unverifiable", extracted=answer, detail=FOR_A_JUDGE)
    if problem.grader == "math" and not problem.answer:
        return Verdict(state="unverifiable", extracted=answer, detail="no reference answer")
    return None


def _task(problem: Problem, answer: str, text: str) -> Task:
    boxes = extract_boxes(text) if problem.grader == "math" else []
    return {
        "grader": problem.grader,
        "reference": problem.answer,
        "answer": answer,
        "question": problem.prompt if problem.grader == "math" else "",
        "boxes": boxes if sum(map(len, boxes)) <= MAX_ANSWER_CHARS else [],
        "metadata": problem.metadata if problem.grader == "reasoning_gym" else {},
    }
