r"""Chains of relations: `x = 5`, `2 + 3 = 5`, `0 \le x < 4`, `\frac{1}{7} \approx 0.143`, `m \in [0, 4)`.

A chain names a value, is an equation or an inequality, or is a statement about numbers: then it has to be true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from distill.verify.mathematics import expressions
from distill.verify.mathematics.numerals import rounds_to
from distill.verify.mathematics.regions import complement, finite, point, region_of
from distill.verify.mathematics.sameness import same_terms
from distill.verify.mathematics.splitting import split
from distill.verify.mathematics.values import (
    Collection,
    Domain,
    Equation,
    Inequality,
    Named,
    Piece,
    Region,
    Row,
    Term,
    UnreadableError,
    Value,
)
from distill.verify.mathematics.words import is_product

SIGNS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\equiv", "\\in", "\\to", "\\sim")
INDEX = r"(?:_\s*(?:\{[^{}]*\}|[A-Za-z0-9]))?'*"
LETTER = rf"(?:[A-Za-z]|\\(?!frac|sqrt|pi\b)[a-zA-Z]+\s*){INDEX}"
ARGUMENTS = r"\([^()]*(?:\([^()]*\)[^()]*)?\)"
NAME = re.compile(
    rf"\s*(?:{LETTER}|{LETTER}\s*(?:\^\s*\{{-1\}}|'+)?\s*{ARGUMENTS}|[A-Z]{{2,4}}'?|\|[A-Z]{{2}}\||\[[A-Z]{{3,6}}\]"
    r"|m?\s*\\(?:angle|overline|overrightarrow|vec|triangle|widehat|hat|bar)\s*\{?\s*[A-Za-z]+\s*\}?"
    r"|\\frac\{d\w\}\{d\w\}|\\text\{[^{}]*\}(?:\s*\\text\{[^{}]*\})*(?:_\w)?|[A-Za-z][A-Za-z ]+|"
    rf"{ARGUMENTS})\s*"
)

DESCRIPTION = re.compile(r"[^\d?&;,]*[A-Za-z][^\d?&;,]*")

Reader = Callable[[str], Term]


def relations(text: str) -> tuple[list[str], list[str]]:
    """Sides of a chain and the signs between them."""
    return split(text, SIGNS)


def is_name(text: str) -> bool:
    """Tell whether a side is what an answer calls its value: `x`, `f(x)`, `\\angle ABC`, `\\text{Area}`, `(x, y)`."""
    bare = text.strip()
    text = bare[1:-1] if bare.startswith("{") and bare.endswith("}") and bare.count("{") == 1 else text
    if len(bare) > 1 and bare.isalpha() and is_product(bare):
        return False
    return NAME.fullmatch(text) is not None and re.search(r"[A-Za-z]", text) is not None


def read_chain(sides: list[str], signs: list[str], term: Reader, recur: Callable[[str], Value]) -> Value:
    """Raises UnreadableError where it says nothing, or what is not true."""
    if "\\to" in signs or "\\sim" in signs or "\\equiv" in signs:
        raise UnreadableError("an arrow")
    if not sides[0].strip():
        if signs[0] not in ("=", "\\approx"):
            raise UnreadableError("a relation without a left side")
        sides, signs = sides[1:], signs[1:]
    if not all(side.strip() for side in sides):
        raise UnreadableError("a relation without a side")
    if not signs:
        return recur(sides[0])
    if "\\approx" in signs:
        return _approximate(sides, signs, term, recur)
    if "\\in" in signs:
        return _membership(sides, signs, recur)
    if set(signs) == {"="}:
        return _equality([side.strip() for side in sides], term, recur)
    if "=" in signs:
        raise UnreadableError("equality and order in one chain")
    return _order([side.strip() for side in sides], signs, term)


def _approximate(sides: list[str], signs: list[str], term: Reader, recur: Callable[[str], Value]) -> Value:
    """What stands before the sign is meant; what stands behind has to be it, rounded."""
    place = signs.index("\\approx")
    exact = sides[: place + 1]
    value = read_chain(exact, signs[:place], term, recur) if place else recur(exact[0])
    if place == 0 and is_name(exact[0]):
        return Named(exact[0].strip(), recur(sides[1]))
    inner = value.value if isinstance(value, Named) else value
    for side in sides[place + 1 :]:
        if not isinstance(inner, Term) or not _rounds(inner, term(side)):
            raise UnreadableError("an approximation of something else")
    return value


def _rounds(exact: Term, rounded: Term) -> bool:
    if rounded.numeral is None:
        return same_terms(exact, rounded)
    if exact.numeral is not None:
        either = ((rounded.numeral, exact.numeral), (exact.numeral, rounded.numeral))
        return any(rounds_to(one, other.value) for one, other in either)
    value = expressions.real_value(exact.latex)
    if value is None:
        return False
    return abs(value - float(rounded.numeral.value)) <= 10.0 ** -(rounded.numeral.decimals or 0)


def _membership(sides: list[str], signs: list[str], recur: Callable[[str], Value]) -> Value:
    if signs != ["\\in"] or not is_name(sides[0]):
        raise UnreadableError("a member of something")
    value = recur(sides[1])
    if isinstance(value, Collection) and value.braced:
        value = Collection(value.items)
    elif isinstance(value, Row):
        value = region_of(value)
    elif not isinstance(value, (Region, Domain)):
        raise UnreadableError("a member of no set")
    return Named(_spelled(sides[0]), value)


def _equality(sides: list[str], term: Reader, recur: Callable[[str], Value]) -> Value:
    if is_name(sides[0]) or _is_description(sides[0], term):
        return Named(_spelled(sides[0]), _agreed(sides[1:], term, recur))
    if is_name(sides[-1]) and len(sides) == 2:
        return Named(_spelled(sides[-1]), recur(sides[0]))
    if len(sides) == 2 and not (_is_constant(sides[0], term) and _is_constant(sides[1], term)):
        terms = [term(side) for side in sides]
        if any(one.unit or one.percent for one in terms[:1]):
            raise UnreadableError("an equation of units")
        return Equation(terms[0].latex, terms[1].latex)
    if all(_is_constant(side, term) for side in sides):
        return _agreed(sides, term, recur)
    if all(_is_constant(side, term) for side in sides[1:]):  # `a + b = 2 + 3 = 5`
        last = _agreed(sides[1:], term, recur)
        return Equation(term(sides[0]).latex, last.latex) if isinstance(last, Term) else last
    return _agreed(sides, term, recur)


def _agreed(sides: list[str], term: Reader, recur: Callable[[str], Value]) -> Value:
    """The last of sides that all have one value. Raises UnreadableError where they have not."""
    if len(sides) == 1:
        return recur(sides[0])
    if all(map(is_name, sides[:-1])) and not any(_is_constant(side, term) for side in sides[:-1]):
        return recur(sides[-1])  # `a = b = 5`
    terms = [term(side) for side in sides]
    if not all(same_terms(one, other) for one, other in pairwise(terms)):
        raise UnreadableError("sides that are not equal")
    return terms[-1]


def _is_description(text: str, term: Reader) -> bool:
    """Tell whether it is no expression, and has no digit that could be another value: `\\det A`."""
    if not DESCRIPTION.fullmatch(text):
        return False
    try:
        term(text)
    except expressions.UnreadableTermError:
        return True
    return False


def _is_constant(text: str, term: Reader) -> bool:
    try:
        read = term(text)
        return read.numeral is not None or expressions.is_constant(read.latex)
    except expressions.UnreadableTermError:
        return False


def _order(sides: list[str], signs: list[str], term: Reader) -> Value:
    constant = [_is_constant(side, term) for side in sides]
    if all(constant):
        raise UnreadableError("an order of numbers")
    named = [place for place, side in enumerate(sides) if not constant[place] and is_name(side)]
    if len(named) == 1 and sum(constant) == len(sides) - 1 and len(sides) <= 3:
        return Named(_spelled(sides[named[0]]), _between(sides, signs, named[0], term))
    if len(sides) != 2:
        raise UnreadableError("a chain of inequalities")
    left, right = (term(side).latex for side in sides)
    if signs[0] in (">", "\\ge"):
        left, right = right, left
    sign: dict[str, Literal["<", "\\le", "\\ne"]] = {"<": "<", ">": "<", "\\le": "\\le", "\\ge": "\\le", "\\ne": "\\ne"}
    return Inequality(left, sign[signs[0]], right)


def _between(sides: Sequence[str], signs: Sequence[str], place: int, term: Reader) -> Region:
    """The numbers that a chain leaves to the name at `place`."""
    if "\\ne" in signs:
        if len(sides) != 2:
            raise UnreadableError("a chain with an inequality")
        return complement(Region((point(term(sides[1 - place])),)))
    if len({sign in ("<", "\\le") for sign in signs}) > 1:
        raise UnreadableError("a chain that turns")
    rising = signs[0] in ("<", "\\le")
    strict = [sign in ("<", ">") for sign in signs]
    before = (term(sides[place - 1]), strict[place - 1]) if place > 0 else None
    after = (term(sides[place + 1]), strict[place]) if place < len(sides) - 1 else None
    low, high = (before, after) if rising else (after, before)
    ends = [finite(end[0]) if end else None for end in (low, high)]
    return Region((Piece(ends[0], ends[1], low[1] if low else True, high[1] if high else True),))


def _spelled(name: str) -> str:
    return re.sub(r"[\s{}]", "", name)
