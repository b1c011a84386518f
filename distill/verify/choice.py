"""Multiple choice: the letter, or the text of the choice, exactly."""

from __future__ import annotations

import re
import string

from distill.records import Problem, VerdictState

WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)


def grade_choice(problem: Problem, answer: str) -> tuple[VerdictState, str]:
    """State and detail. The reference is a letter, or the text of one of `metadata["choices"]`."""
    choices = [str(choice) for choice in problem.metadata.get("choices", [])]
    letters = string.ascii_uppercase[: len(choices) or 26]
    reference = _which(problem.answer or "", choices, letters)
    if reference is None:
        return "unverifiable", "the reference names no choice"
    given = _which(answer, choices, letters)
    if given is None:
        return "wrong", "names no choice"
    return ("correct", "") if given == reference else ("wrong", f"chose {letters[given]}")


def _which(text: str, choices: list[str], letters: str) -> int | None:
    """Position of the choice that `text` names: `B`, `(B)`, `B.`, `\\text{B}`, `B. two`, `two`."""
    text = _plain(text)
    exact = [index for index, choice in enumerate(choices) if _plain(choice) == text]
    if len(exact) == 1:
        return exact[0]
    match = re.fullmatch(r"\(?([A-Za-z])\)?[.:)]?(?:\s+(.*))?", text, re.DOTALL)
    if match is None or match[1].upper() not in letters:
        return None
    index = letters.index(match[1].upper())
    if match[2] is not None and (index >= len(choices) or _plain(match[2]) != _plain(choices[index])):
        return None
    return index


def _plain(text: str) -> str:
    text = text.strip().strip("$").strip()
    if match := WRAPPED.fullmatch(text):
        text = match[1]
    return " ".join(text.split()).casefold()
