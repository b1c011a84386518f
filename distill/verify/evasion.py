"""Answers of the reference's value that are no answers all the same: the question `1+2` has the value of its answer."""

from __future__ import annotations

import re

OPERATION = re.compile(
    r"[-+*!^=]|\\(?:sqrt|cdot|times|div|sum|prod|int|lim|log|ln|sin|cos|tan|binom|max|min|lfloor|lceil)"
)
PLAIN_NUMBER = re.compile(r"[-+]?[\d.,]+(?:/[\d.]+)?|[-+]?\\[dt]?frac\{?\d+\}?\{?\d+\}?|[-+]?\w+")
LOOKS = re.compile(r"\\left|\\right|\\[,;:! ]|\\displaystyle|\\quad|[\s$]|\\[()\[\]]")


def repeats_the_question(question: str, reference: str, answer: str) -> bool:
    r"""Tell whether it is a calculation that stands in the question, where the reference is what comes of it.

    >>> repeats_the_question("What is $1 + 2$?", "3", "1+2"), repeats_the_question("Solve $x + 1 = 3$.", "2", "x=2")
    (True, False)
    """
    given, wanted = LOOKS.sub("", answer), LOOKS.sub("", reference)
    if not OPERATION.search(given) or PLAIN_NUMBER.fullmatch(given):
        return False
    asked = LOOKS.sub("", question)
    return given in asked and wanted != given and not OPERATION.search(wanted.lstrip("-"))
