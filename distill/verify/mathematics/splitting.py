"""Where a text may be taken apart: at signs that stand outside of all brackets."""

from __future__ import annotations

import re
from collections.abc import Sequence

AND, OR = "\ue002", "\ue001"
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
OPENING = frozenset(("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"))
CLOSING = frozenset((")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"))
PAIRS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}
# `and` and `or` between parts; within a text that says more (`\text{Anna and Bob}`) they are its own.
LINK = re.compile(
    r"[\s,;]*(?:\\text\{\s*,?\s*(and|or)\s*\}|(?<![A-Za-z\\])(and|or)(?![A-Za-z]))[\s,]*|\\text\{[^{}]*\}"
)


def connect(text: str) -> str:
    """Put one sign for `and`, and one for `or`, in whichever way they are written."""
    signs = {"and": AND, "or": OR}
    return LINK.sub(lambda link: signs.get(link[1] or link[2], link[0]), text)


def split(text: str, separators: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts of the text between separators outside of brackets, and those separators. Environments are not entered."""
    parts, links = [""], list[str]()
    depth = bars = 0
    for match in TOKEN.finditer(text):
        token = match.group()
        if token == "\\begin":
            depth += 1
        elif token == "\\end":
            depth -= 1
        elif token in OPENING:
            depth += 1
        elif token in CLOSING:
            depth -= 1
        elif token == "|" and "|" not in separators:
            bars ^= 1
        elif token in separators and depth == 0 and not bars:
            links.append(token)
            parts.append("")
            continue
        parts[-1] += token
    return parts, links


def whole(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket of a text in one pair of brackets, which may be of two kinds."""
    tokens = [match.group() for match in TOKEN.finditer(text)]
    if not tokens or tokens[0] not in PAIRS:
        return None
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            if place != len(tokens) - 1 or token not in PAIRS.values():
                return None
            if token != PAIRS[tokens[0]] and {tokens[0], token} - {"(", ")", "[", "]"}:
                return None
            return tokens[0], "".join(tokens[1:-1]), token
    return None
