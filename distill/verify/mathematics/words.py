"""Which answers are words, and not products of variables: `ABC` is no `CBA`, `even` no `neve`; `ab` is `ba`."""

from __future__ import annotations

import re

from distill.verify.typeset import words_of

# Runs of these, and of nothing else, are products; no English word is left among them but for those of TWO_LETTERS.
VARIABLES = (frozenset("abcdxyz"), frozenset("bcdfghjklmnpqrstvwxz"), frozenset("uvwxyz"), frozenset("abrht"))
TWO_LETTERS = frozenset(
    re.findall(r"\S+", "no on up at as an in is it of or so to we he me my by go do if be am us ad ax ah ha")
)
FAMILIAR = frozenset(re.findall(r"\S+", "bad dab cab add dad day bay rat tar bat tab hat art bath that"))
RUN = re.compile(r"[A-Za-z]+")
PROSE = re.compile(r"[A-Za-z][A-Za-z\s.,'’-]*[A-Za-z.]")
WITH_TEXT = re.compile(r"(?:\\text\{[^{}]*\}|[\w\s.,'’():/-])+")
TEXT_LETTER = re.compile(r"\\text\{[^{}]*[^\W\d_][^{}]*\}")
FOREIGN = re.compile(r"[^\W\d_a-zA-Z]")
FIGURE = re.compile(
    r"\\(angle|triangle|overline|overrightarrow|overleftrightarrow|vec|widehat|odot|square)\s*\{?\s*([A-Z]+'?)\s*\}?"
)


def as_words(text: str) -> str | None:
    r"""The words that a plainly set text is, in the form in which words are compared; None where it is mathematics.

    >>> as_words("\\text{June }20"), as_words("ABC"), as_words("ab"), as_words("5x")
    ('june20', 'abc', None, None)
    """
    text = text.strip()
    if (figure := FIGURE.fullmatch(text)) is not None:
        return f"{figure[1]} {figure[2]}"
    if (TEXT_LETTER.search(text) and WITH_TEXT.fullmatch(text)) or FOREIGN.search(text):
        return words_of(text)
    if RUN.fullmatch(text):
        return None if is_product(text) else words_of(text)
    return words_of(text) if PROSE.fullmatch(text) and max(map(len, text.split())) > 2 else None


def is_product(run: str) -> bool:
    """Tell whether a run of letters is a product of variables: capitals beside each other name points or are labels."""
    if len(run) == 1:
        return True
    if any(letter.isupper() for letter in run):
        return len(run) == 2 and run[0].isupper() != run[1].isupper()
    if run in TWO_LETTERS or run in FAMILIAR:
        return False
    return any(set(run) <= family for family in VARIABLES) or (len(run) == 2 and not set(run) <= set("aeiou"))


def same_words(one: str, other: str) -> bool:
    """Tell whether two texts say the same; a figure's sign (`\\angle A`) may be missing on one side."""
    first, second = one.rpartition(" "), other.rpartition(" ")
    if first[0] and second[0]:
        return one == other
    return first[2].casefold() == second[2].casefold()
