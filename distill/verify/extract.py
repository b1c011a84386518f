"""The answer of a completion, after its reasoning: the last `\\boxed{}`, or the last block of Python where a program is
asked for. Linear in the text.

`\\fbox{}` and `\\framebox{}`, LaTeX's own boxes, count as well. Boxes with nothing between them but a comma, `and` or
`or` are one answer. A last box that is never closed is no answer, and none before it takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from distill.records import Grader

OPEN, CLOSE = "<think>", "</think>"
FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
PYTHON = ("python", "py", "python3")
BETWEEN = re.compile(r"[\s$]*(?:,|;|,?[\s$]*(?:\\text\{)?\s*(?:and|or)\s*\}?)[\s$]*")
MAX_BETWEEN = 40  # characters
MAX_BOXES = 12  # of one answer
TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*\{|\\.|[{}]", re.DOTALL)


class _Box(NamedTuple):
    start: int  # of its content
    end: int
    opened_at: int


def extract_answer(text: str) -> str | None:
    r"""The answer, stripped, or None where the text has none: reasoning never closed, no box, a last one never closed.

    >>> extract_answer("<think>\n\\boxed{1}\n</think>\n\nSo \\boxed{\\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("It is $\\boxed{2}$ or $\\boxed{5}$.")
    '2 \\text{ or } 5'
    """
    after = _after_reasoning(text)
    boxes = [] if after is None else _boxes(after)
    if after is None or not boxes:
        return None
    contents = [after[box.start : box.end].strip() for box in boxes[-MAX_BOXES:]]
    answer = contents.pop()
    for box, following in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        between = after[box.end + 1 : following.opened_at]
        if not contents or len(between) > MAX_BETWEEN or not BETWEEN.fullmatch(between):
            break
        answer = contents.pop() + (" \\text{ or } " if "or" in between else ", ") + answer
    return answer


def in_one_line(parts: Sequence[str]) -> str:
    """Parts of an answer, each once, as one."""
    return ", ".join(dict.fromkeys(parts))


def extract_boxes(text: str) -> list[str]:
    """What stands in each box after the reasoning, where there are several but no more than an answer has parts."""
    after = _after_reasoning(text)
    boxes = [] if after is None else _boxes(after)
    if after is None or not 1 < len(boxes) <= MAX_BOXES:
        return []
    parts = [after[box.start : box.end].strip() for box in boxes]
    return parts if all(parts) else []


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


def _boxes(text: str) -> list[_Box]:
    """Boxes that are closed and hold no other, in order; none where the one that is opened last is not closed."""
    opened: list[tuple[bool, int, int]] = []
    boxes: list[_Box] = []
    for match in TOKEN.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            opened.append((token != "{", match.end(), match.start()))
        elif token == "}" and opened:
            boxed, start, opened_at = opened.pop()
            if boxed and (not boxes or boxes[-1].start < start):
                boxes.append(_Box(start, match.start(), opened_at))
    left_open = [start for boxed, start, _ in opened if boxed]
    return [] if left_open and (not boxes or left_open[-1] > boxes[-1].start) else boxes
