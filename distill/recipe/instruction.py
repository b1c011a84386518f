"""Instructions around a question, and the form in which a teacher answers: what every teacher's section has.

A question is asked alike wherever it is asked: by every backend, of a student that learned with the instruction, and in
evaluation.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill.recipe.config import Config
from distill.records import Problem

Reasoning = Literal["tagged", "plain"]


class Instruction(Config):
    """Words around a question; the empty text is none."""

    system_prompt: str | None = Field(None, description="the system turn, instead of the one that the template has")
    prompt_suffix: str | None = Field(None, description="stands behind every question, after a blank line")

    @property
    def words(self) -> list[str | None]:
        """System prompt and suffix, for an identity; nothing where there is neither."""
        words = [self.system_prompt or None, self.prompt_suffix or None]
        return words if any(words) else []

    def asked(self, question: str) -> str:
        """The user's turn.

        >>> Instruction(prompt_suffix="Think.").asked("1 + 1?")
        '1 + 1?\\n\\nThink.'
        """
        return f"{question}\n\n{self.prompt_suffix}" if self.prompt_suffix else question

    def around(self, problem: Problem) -> Instruction:
        """What stands around the problem: nothing where it is a text to write, for which no answer is to be given."""
        return UNINSTRUCTED if problem.grader == "none" else self

    def turns(self, question: str) -> list[dict[str, Any]]:
        """The conversation that asks it."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": self.asked(question)}]


UNINSTRUCTED = Instruction()


class InstructedTeacher(Instruction):
    """A teacher of any backend: how it is asked, and what its text is."""

    reasoning: Reasoning = Field(
        "tagged",
        description="`plain`: it writes no <think> (any instruct model); its whole text is taken for reasoning",
    )

    @property
    def instruction(self) -> Instruction:
        return Instruction(system_prompt=self.system_prompt, prompt_suffix=self.prompt_suffix)
