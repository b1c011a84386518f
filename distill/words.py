"""Texts as the filters compare them: folded, cut into words or symbols, and as runs of so many of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

WORD = re.compile(r"\w+")
SYMBOL_OR_WORD = re.compile(r"\w+|[^\w\s]")

Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """Words and numbers, whatever the case and the Unicode form; punctuation is left out."""
    return tuple(WORD.findall(fold_case(text)))


def symbols_of(text: str) -> Words:
    """Split as `words_of` does, with every other sign by itself: `1 - 2` is not `1 + 2`."""
    return tuple(SYMBOL_OR_WORD.findall(fold_case(text)))


def fold_case(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def runs(words: Words, length: int) -> Iterator[Words]:
    """Every run of `length` neighbours, overlapping, from left to right."""
    return (words[start : start + length] for start in range(len(words) - length + 1))
