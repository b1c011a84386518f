"""Does a trace that was asked with a hint speak of it? A student would learn to be told answers that nobody tells it.

Phrases, not understanding: what names the hint, or says that an answer is known before it is found. A phrase that may
be innocent (`the given answer`) counts too: what is lost is a second try. `as given in the problem` does not.
"""

from __future__ import annotations

import re

ANSWER = r"(?:final |correct |right |actual )?(?:answer|result|solution)"
KNOWN = r"(?:given|known|provided|stated|expected|hinted|intended|reference|suggested|supposed|told|supplied)"
LEAKS = re.compile(
    "|".join(
        (
            r"\bhint(?:s|ed)?\b",
            rf"\bas {KNOWN}\b(?! (?:in|by) the (?:problem|question))",
            rf"\b{KNOWN} (?:{ANSWER}|value of the {ANSWER})\b",
            rf"\b{ANSWER} (?:that )?(?:is|was|has been|we (?:are|were)|i (?:am|was)) (?:already )?{KNOWN}\b",
            rf"\b{ANSWER} (?:is|was) (?:known|given|said|supposed|told|stated) to be\b",
            rf"\b(?:we|i) (?:are|were|am|was|have been)(?: already)? (?:told|given) (?:that )?(?:the|an?) {ANSWER}\b",
            rf"\b(?:we|i) (?:already )?know (?:that )?(?:the|an?) {ANSWER}\b",
            rf"\b(?:match|matche|agree|confirm|equal|coincide|fit)s? (?:with )?(?:the|your|this) {KNOWN}\b",
            r"\b(?:pretend|as if) (?:we|i|you) (?:do|did)(?:n't| not) know\b",
            r"\bdo(?:n't| not) mention\b",
        )
    ),
    re.IGNORECASE,
)


def hint_leak(text: str) -> str | None:
    """The phrase that gives the hint away, or None.

    >>> hint_leak("Since the answer is known to be 7, 3 + x = 7."), hint_leak("As given in the problem, he has 3.")
    ('answer is known', None)
    """
    found = LEAKS.search(" ".join(text.split()))
    return None if found is None else found.group()
