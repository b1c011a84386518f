"""Text of others, fit to be shown: a name or a message is never an instruction to the terminal."""

from __future__ import annotations

import unicodedata

# Control, format (among them those that turn the direction of writing), half a surrogate pair, unassigned; line ends.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""`text` in one line, with the characters that a terminal would obey, or could not write, as Python escapes them.

    >>> printable("data[v2]\x1b[2J")
    'data[v2]\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in UNPRINTABLE else one for one in text)
