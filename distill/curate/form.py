"""The form in which students learn: completions made of a teacher's texts, questions with or without its instruction.

A tagged trace is learned as it is. A plain one, of a teacher that writes no `<think>`, is put between the tags whole,
and its answer stands once more behind them: R1's format (arXiv 2501.12948), which graders, students and servers share.
"""

from __future__ import annotations

from typing import NamedTuple

from distill.reasoning import FORCED_END, THINK_LINE
from distill.recipe import Instruction, Reasoning
from distill.records import Example, Grader, Message, Problem, Trace, Verdict
from distill.verify.extract import answer_of, bare_answer, has_tags


class ExampleForm(NamedTuple):
    """`reasoning` is how the teacher's text marks its thinking, `instruction` what a question is learned with."""

    reasoning: Reasoning
    instruction: Instruction

    def reasoned(self, problem: Problem, trace: Trace, verdict: Verdict) -> Example:
        example = self._example(problem, verdict, self._completion(trace.text, problem.grader), trace.key)
        return example.model_copy(update={"hinted": trace.hinted})

    def bare(self, problem: Problem, answer: str, verdict: Verdict) -> Example:
        """The same question with nothing but its answer, which no trace stands behind."""
        return self._example(problem, verdict, bare_answer(answer, problem.grader), None)

    def _completion(self, text: str, grader: Grader) -> str:
        r"""What of a text is learned; one without an answer, or with tags of its own, stays as it is."""
        answer = None if self.reasoning == "tagged" or has_tags(text) else answer_of(text, grader)
        if answer is None:
            return text
        return f"{THINK_LINE}{text.strip()}{FORCED_END}{bare_answer(answer, grader)}"

    def _example(self, problem: Problem, verdict: Verdict, completion: str, trace_key: str | None) -> Example:
        *history, asked = self.instruction.turns(problem.prompt)
        return Example(
            question=asked["content"],
            completion=completion,
            problem_id=problem.id,
            trace_key=trace_key,
            source=problem.source,
            relabelled=verdict.relabelled,
            history=tuple(Message(**turn) for turn in history),
        )
