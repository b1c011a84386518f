"""Multiple choice: the letter, or the text of the choice, exactly, in whatever typesetting."""

from __future__ import annotations

import re
import string

from distill.records import Problem, VerdictState
from distill.verify.mathematics.keyboard import to_latex
from distill.verify.mathematics.numerals import read_numeral, same_number
from distill.verify.typeset import plain

# `B`, `(B)`, `[B]`, `B.`, `B) 15`, `B: 15`, `(B) 15`, and a word before it.
LETTERED = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?[(\[]?\s*([a-z])\s*(?:[)\]]\s*[.:]?|[.:])?(?:(?<=[)\].:\s])\s*(\S.*))?",
    re.DOTALL,
)
MAX_CHARS = 1_000  # of an answer that is brought into LaTeX's own form; no choice is as long
OTHER_LETTER = re.compile(r"(?<![a-z\\])(?:[a-h]|or|and|not|nor)(?![a-z])")


def grade_choice(problem: Problem, answer: str) -> tuple[VerdictState, str]:
    """State and detail. The reference is a letter, or the text of one of `metadata["choices"]`."""
    choices = [_bare(str(choice)) for choice in problem.metadata.get("choices", [])]
    letters = string.ascii_lowercase[: len(choices) or 26]
    reference = _which(_bare(problem.answer or ""), choices, letters)
    if reference is None:
        return "unverifiable", "the reference names no choice"
    given = _which(_bare(answer), choices, letters)
    if given is None:
        return "wrong", "names no choice"
    return ("correct", "") if given == reference else ("wrong", f"chose {letters[given].upper()}")


def _which(text: str, choices: list[str], letters: str) -> int | None:
    """Position of the choice that `text` names: `B`, `(B)`, `B. two`, `two`."""
    exact = [index for index, choice in enumerate(choices) if _same(choice, text)]
    if len(exact) == 1:
        return exact[0]
    match = LETTERED.fullmatch(text)
    if match is None or match[1] not in letters:
        return None
    index = letters.index(match[1])
    if match[2] is None:
        return index
    if not choices:  # nothing to hold the text against, but it may not name another letter
        return None if OTHER_LETTER.search(match[2]) else index
    return index if _same(match[2], choices[index]) else None


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = read_numeral(one), read_numeral(other)
    return first is not None and second is not None and same_number(first, second)


def _bare(text: str) -> str:
    """The text without typesetting, prose told from mathematics by nothing any more."""
    text = plain(text)
    if len(text) <= MAX_CHARS:
        text = to_latex(text)
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    return " ".join(text.replace("\\$", "").split()).casefold()
