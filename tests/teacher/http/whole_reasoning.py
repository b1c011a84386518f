"""Reasoning and answer of a text that is there as a whole: what the splitter of pieces must come to."""

from __future__ import annotations

from distill.reasoning import END_OF_THINKING, THINK_LINE


def split(text: str, *, has_ended: bool = False) -> tuple[str, str | None]:
    """Reasoning and answer of a whole text; None where it ended before `</think>`."""
    if has_ended:
        return "", text
    thought, tag, answer = text.removeprefix(THINK_LINE).partition(END_OF_THINKING)
    return thought, answer if tag else None
