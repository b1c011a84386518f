"""Whether an answer is its reference, both read: the reference decides what is asked for, and how strictly.

A reference that is a value takes it under any name (`x = 5`), one with a name takes the bare value; an equation takes
its multiples alone. Tuples keep their order, lists and sets have none; `(1, 2)` is an interval where the other is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill.verify.mathematics import expressions
from distill.verify.mathematics.numerals import read_numeral
from distill.verify.mathematics.regions import ordered, region_of
from distill.verify.mathematics.sameness import same_terms
from distill.verify.mathematics.splitting import split
from distill.verify.mathematics.units import same_unit
from distill.verify.mathematics.values import (
    Applied,
    Based,
    Collection,
    Described,
    Domain,
    Equation,
    Grid,
    Inequality,
    Named,
    Piece,
    Ratio,
    Region,
    Residue,
    Row,
    System,
    Term,
    UnreadableError,
    Value,
    Words,
)
from distill.verify.mathematics.words import same_words

BASE_ASKED = re.compile(r"\b(?:base|binary|octal|hexadecimal|ternary)\b", re.IGNORECASE)
TUPLES = (("(", ")"), ("\\langle", "\\rangle"))
MAX_ITEMS = 60  # of a list without order: comparing them is quadratic


def same(reference: Value, given: Value, question: str = "") -> bool:
    """Raises UnreadableTermError and UnreadableError where sympy or we cannot tell after all."""
    if isinstance(reference, Named) or isinstance(given, Named):
        return _same_named(reference, given, question)
    if isinstance(reference, Words) or isinstance(given, Words):
        return isinstance(reference, Words) and isinstance(given, Words) and same_words(reference.key, given.key)
    if isinstance(reference, Region) or isinstance(given, Region):
        return _same_regions(reference, given)
    if isinstance(reference, Equation) or isinstance(given, Equation):
        return _same_equations(reference, given, question)
    if isinstance(reference, System) or isinstance(given, System):
        return _same_systems(reference, given)
    if isinstance(reference, Collection) or isinstance(given, Collection):
        return _same_collections(reference, given)
    return _same_kind(reference, given, question)


def _same_kind(reference: Value, given: Value, question: str) -> bool:
    match reference, given:
        case Term(), Term():
            return same_terms(reference, given)
        case Row(), Row():
            alike = (reference.opening, reference.closing) == (given.opening, given.closing)
            long = len(reference.items) > 2  # no interval: brackets are a matter of taste
            return (alike or long) and _pairwise(reference.items, given.items)
        case Grid(), Grid():
            alike = reference.determinant == given.determinant and len(reference.rows) == len(given.rows)
            return alike and all(map(_pairwise, reference.rows, given.rows))
        case Ratio(), Ratio():
            return same_unit(reference.unit, given.unit) and _pairwise(reference.items, given.items)
        case Ratio(items=(above, below)), Term() if len(below.latex) == 1 or not below.latex.isdigit():
            return same_terms(given, Term(f"({above.latex})/({below.latex})"))
        case Based(), Based():
            return reference == given
        case Based(), Term():  # the base is known from the question
            return given.latex.lstrip("0") == reference.digits
        case Term(), Based():
            return BASE_ASKED.search(question) is not None and reference.latex.lstrip("0") == given.digits
        case Residue(), Residue():
            return same_terms(reference.value, given.value) and same_terms(reference.modulus, given.modulus)
        case Residue(), Term():
            return same_terms(reference.value, given)
        case Applied(), Applied():
            return reference.head == given.head and _pairwise(reference.items, given.items)
        case Inequality(), Inequality():
            return _same_inequalities(reference, given)
        case (Domain(), Domain()) | (Described(), Described()):
            return reference == given
    return False


def _pairwise(references: Sequence[Value], given: Sequence[Value]) -> bool:
    return len(references) == len(given) and all(map(same, references, given))


def _same_named(reference: Value, given: Value, question: str) -> bool:
    if isinstance(reference, Named) and isinstance(given, Named):
        if reference.name == given.name or not (_is_variable(reference.name) and _is_variable(given.name)):
            return same(reference.value, given.value, question)
        return _as_equations(reference, given)
    if isinstance(reference, Named):
        if isinstance(given, Equation):
            return _as_equations(reference, given)
        return not isinstance(given, System) and same(reference.value, given, question)
    assert isinstance(given, Named)
    if isinstance(reference, Equation):
        return _as_equations(reference, given)
    if isinstance(reference, System):
        return same(reference, given.value, question)
    return same(reference, given.value, question)


def _is_variable(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z]|\\[a-z]+", name) is not None


def _as_equations(one: Value, other: Value) -> bool:
    """`y = -2x + 3` and `4x + 2y - 6 = 0` are one line; `y = 5` and `x = 5` are two."""
    sides = [
        (value.name, value.value.latex)
        if isinstance(value, Named) and isinstance(value.value, Term)
        else (value.left, value.right)
        if isinstance(value, Equation)
        else None
        for value in (one, other)
    ]
    if sides[0] is None or sides[1] is None:
        return False
    first, second = (f"({left})-({right})" for left, right in (sides[0], sides[1]))
    return expressions.ratio_is_constant(first, second) is not None


def _same_equations(reference: Value, given: Value, question: str) -> bool:
    if isinstance(reference, Equation) and isinstance(given, Equation):
        return _as_equations(reference, given)
    # `m + n = 113` where 113 is asked for: the left side is what was asked, not an equation that is left to solve.
    if isinstance(given, Equation) and isinstance(reference, Term):
        asked = re.sub(r"[\s{}$]", "", given.left) in re.sub(r"[\s{}$]", "", question)
        if asked or _is_sum_or_product(given.left):
            return same_terms(reference, Term(given.right, read_numeral(given.right)))
    return False


def _is_sum_or_product(latex: str) -> bool:
    expression = expressions.parse(latex)
    return len(expression.free_symbols) > 1 or bool(expression.is_Function)


def _same_systems(reference: Value, given: Value) -> bool:
    if isinstance(reference, System) and isinstance(given, System):
        wanted, found = ({one.name: one.value for one in system.values} for system in (reference, given))
        return wanted.keys() == found.keys() and all(same(value, found[name]) for name, value in wanted.items())
    system, other = (reference, given) if isinstance(reference, System) else (given, reference)
    assert isinstance(system, System)
    values = [one.value for one in system.values]
    in_order = [one.value for one in sorted(system.values, key=lambda one: one.name)]
    if isinstance(other, Collection) and not other.braced:
        other = Row(other.items, "(", ")")
    if not isinstance(other, Row):
        return False
    candidates = [in_order] if system is given else [values, in_order]
    return any(_pairwise(other.items, candidate) for candidate in candidates)


def _same_collections(reference: Value, given: Value) -> bool:
    if isinstance(reference, Collection) and isinstance(given, Collection):
        return _same_items(reference, given)
    collection, other = (reference, given) if isinstance(reference, Collection) else (given, reference)
    assert isinstance(collection, Collection)
    if len(collection.items) == 1:
        return same(
            reference if other is reference else collection.items[0], given if other is given else collection.items[0]
        )
    if (
        isinstance(other, Row) and not collection.braced and (other.opening, other.closing) in TUPLES
    ):  # `1, 2` for `(1, 2)`
        return _pairwise(collection.items, other.items)
    if isinstance(other, Term) and "," in other.latex:  # `100,200`: a number, or two
        return _same_items(
            collection, Collection(tuple(Term(item, read_numeral(item)) for item in split(other.latex, ",")[0]))
        )
    return False


def _same_items(reference: Collection, given: Collection) -> bool:
    """Every item has its partner; what stands twice in a set stands there once."""
    if max(len(reference.items), len(given.items)) > MAX_ITEMS:
        return _pairwise(reference.items, given.items)
    sets = reference.braced or given.braced
    wanted, left = (_distinct(one.items) if sets else list(one.items) for one in (reference, given))
    if len(wanted) != len(left):
        return False
    for item in wanted:
        partner = next((place for place, other in enumerate(left) if _same_or_unreadable(item, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _same_or_unreadable(one: Value, other: Value) -> bool:
    try:
        return same(one, other)
    except (UnreadableError, expressions.UnreadableTermError):
        return False


def _distinct(items: Sequence[Value]) -> list[Value]:
    distinct: list[Value] = []
    for item in items:
        if not any(_same_or_unreadable(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _same_regions(reference: Value, given: Value) -> bool:
    try:
        first, second = (ordered(region_of(value)) for value in (reference, given))
    except UnreadableError:
        return False
    return len(first) == len(second) and all(map(_same_pieces, first, second))


def _same_pieces(one: Piece, other: Piece) -> bool:
    if (one.low_open, one.high_open) != (other.low_open, other.high_open):
        return False
    for end, other_end in ((one.low, other.low), (one.high, other.high)):
        if (end is None) != (other_end is None):
            return False
        if end is not None and other_end is not None and not same_terms(end, other_end):
            return False
    return True


def _same_inequalities(reference: Inequality, given: Inequality) -> bool:
    if reference.sign != given.sign:
        return False
    first, second = (f"({one.left})-({one.right})" for one in (reference, given))
    sign = expressions.ratio_is_constant(first, second)
    return sign == 1 or (sign == -1 and reference.sign == "\\ne")
