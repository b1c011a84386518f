"""The question in what a teacher wrote, or why there is none: strict, because what is misread becomes a problem."""

from __future__ import annotations

import re

from distill.records import FinishReason
from distill.verify.extract import CLOSE, OPEN

BEGIN, END = "<question>", "</question>"
MIN_WORDS, MAX_CHARACTERS = 4, 4_000
WORKED = re.compile(
    r"\\boxed|####|</?think>|</?answer>|```|\bstep 1\b|(?:^|\n)\W*(?:answer|solution|explanation|hint)\W*:|"
    r"\bthe answer is\b",
    re.IGNORECASE,
)
SLOTS = re.compile(r"\{(?:question|answer)\}|\[[A-Za-z ]+\]|</?question>")
ASKS = re.compile(
    r"[?？]|\b(?:find|calculate|compute|determine|evaluate|express|simplify|solve|work out|write|give)\b",
    re.IGNORECASE,
)


def read_question(text: str, finish_reason: FinishReason) -> tuple[str | None, str]:
    """The question between its tags, or None with the reason: `read_question(...)` is `(question, "")` or
    `(None, why)`. What stands around the tags does not count, nor does reasoning before it.

    >>> read_question("Sure!\\n<question>\\nHow many legs have 3 dogs?\\n</question>", "stop")
    ('How many legs have 3 dogs?', '')
    """
    _, closed, written = text.rpartition(CLOSE)
    if OPEN in text and not closed:
        return None, "reasoning that never ends"
    if written.count(BEGIN) > 1 or written.count(END) > 1:
        return None, "several questions"
    _, begun, rest = written.partition(BEGIN)
    question, ended, _ = rest.partition(END)
    if not begun or not ended:
        return None, "cut off at the token limit" if finish_reason == "length" else f"no {BEGIN} with {END}"
    question = question.strip()
    return (None, why) if (why := _why_not(question)) else (question, "")


def _why_not(question: str) -> str:
    if len(question.split()) < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    if len(question) > MAX_CHARACTERS:
        return f"more than {MAX_CHARACTERS:,} characters"
    if WORKED.search(question):
        return "holds an answer or its working"
    if SLOTS.search(question):
        return "has blanks to fill in"
    return "" if ASKS.search(question) else "asks nothing"
