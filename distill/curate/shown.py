"""Examples of what each filter dropped, for a person to look at: the funnel as `funnel.json` keeps it.

A number says that a filter dropped a tenth; only what it dropped says whether it should have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from distill.curate.candidates import Candidate, DroppedTrace

NUM_EXAMPLES = 3  # a filter
QUESTION_CHARACTERS = 1_200
COMPLETION_CHARACTERS = 800


class DroppedExamples:
    """The first few samples that each filter dropped, with their texts cut to what a page can show."""

    def __init__(self) -> None:
        self._of: dict[str, list[dict[str, str]]] = defaultdict(list)

    def add(self, candidate: Candidate, dropped: DroppedTrace) -> None:
        kept = self._of[dropped.filter]
        if len(kept) < NUM_EXAMPLES:
            question = cut(candidate.problem.prompt, QUESTION_CHARACTERS)
            completion = cut(candidate.trace.text, COMPLETION_CHARACTERS)
            kept.append({"key": dropped.key, "detail": dropped.detail, "question": question, "completion": completion})

    def beside(self, funnel: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The funnel's steps, each with its examples."""
        return [{**step, "examples": self._of.get(step["filter"], [])} for step in funnel]


def cut(text: str, num_characters: int) -> str:
    """Beginning and end of a long text, which is where a trace says what it does and what it found."""
    if len(text) <= num_characters:
        return text
    half = num_characters // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
