"""The answer of a completion, after its reasoning: the last balanced `\\boxed{}`, or the last block of Python where a
program is asked for. Linear in the text.

`\\fbox{}` and `\\framebox{}`, LaTeX's own boxes, count as well.
"""

from __future__ import annotations

import re

from distill.records import Grader

OPEN, CLOSE = "<think>", "</think>"
FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
PYTHON = ("python", "py", "python3")
TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The answer, stripped, or None where the text has none: reasoning never closed, no box, a box never closed.

    >>> extract_answer("<think>\n\\boxed{1}\n</think>\n\nSo \\boxed{\\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    after = _after_reasoning(text)
    return None if after is None else _last_box(after)


def extract_program(text: str) -> str | None:
    r"""The last closed fenced block that says it is Python, else the last that says nothing; None without either.

    >>> extract_program("<think>\n</think>\n\n```python\nprint(1)\n```\nDone.")
    'print(1)\n'
    """
    after = _after_reasoning(text)
    if after is None:
        return None
    found: dict[bool, str] = {}
    fence, says, start = "", "", 0
    position = 0
    for line in after.splitlines(keepends=True):
        bare = line.strip()
        match = FENCE.fullmatch(bare)
        if not fence:
            if match is not None:
                fence, says, start = match[1], match[2].lower(), position + len(line)
        elif bare.startswith(fence) and not bare.strip(fence[0]):
            if says in PYTHON or not says:
                found[bool(says)] = after[start:position]
            fence = ""
        position += len(line)
    return found.get(True, found.get(False))


def answer_of(text: str, grader: Grader) -> str | None:
    """Extract what the grader is given to grade."""
    return extract_program(text) if grader == "code" else extract_answer(text)


def bare_answer(answer: str, grader: Grader) -> str:
    """An answer with nothing around it but what `answer_of` looks for."""
    return f"```python\n{answer.strip()}\n```" if grader == "code" else f"\\boxed{{{answer}}}"


def has_tags(text: str) -> bool:
    return OPEN in text or CLOSE in text


def reasoning_is_complete(text: str, grader: Grader = "math") -> bool:
    """Tell whether the text opens its reasoning, closes it once, and answers after it."""
    return text.startswith(OPEN) and text.count(OPEN) == text.count(CLOSE) == 1 and answer_of(text, grader) is not None


def _after_reasoning(text: str) -> str | None:
    """Return what follows the last closed reasoning; all of a text that opens none; None where it is never closed."""
    _, closed, after = text.rpartition(CLOSE)
    return None if not closed and OPEN in text else after


def _last_box(text: str) -> str | None:
    """Find the box that is opened last among those that are closed."""
    opened: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in TOKEN.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            boxed, start = opened.pop()
            if boxed and (best is None or start > best[0]):
                best = (start, match.start())
    return text[best[0] : best[1]].strip() if best else None
