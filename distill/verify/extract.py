"""What a completion answers: the content of the last balanced `\\boxed{}` after the reasoning. Linear in the text.

`\\fbox{}` and `\\framebox{}`, LaTeX's own boxes, count as well.
"""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The answer, stripped, or None where the text has none: reasoning never closed, no box, a box never closed.

    >>> extract_answer("<think>\n\\boxed{1}\n</think>\n\nSo \\boxed{\\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    _, closed, after = text.rpartition(CLOSE)
    if not closed and OPEN in text:
        return None
    return _last_box(after)


def reasoning_is_complete(text: str) -> bool:
    """Whether the text opens its reasoning, closes it once, and answers after it."""
    return text.startswith(OPEN) and text.count(OPEN) == text.count(CLOSE) == 1 and extract_answer(text) is not None


def _last_box(text: str) -> str | None:
    """Of the boxes that are closed, the one that is opened last."""
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
