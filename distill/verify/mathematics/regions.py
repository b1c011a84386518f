"""Unions of intervals: put in order, joined, cut, and turned into their complement."""

from __future__ import annotations

import math
from collections.abc import Iterable

from distill.verify.mathematics import expressions
from distill.verify.mathematics.values import (
    Collection,
    Domain,
    Named,
    Piece,
    Region,
    Row,
    Term,
    UnreadableError,
    Value,
)

End = tuple[float, int]  # an end and on which side of it the interval begins or stops: -1 before, 0 at, 1 behind


def is_region(value: object) -> bool:
    return isinstance(value, Region)


def point(term: Term) -> Piece:
    return Piece(term, term, low_open=False, high_open=False)


def region_of(value: Value) -> Region:
    """A value as a region: an interval, points. Raises UnreadableError where it is none."""
    if isinstance(value, Region):
        return value
    if isinstance(value, Named):
        return region_of(value.value)
    if isinstance(value, Row) and len(value.items) == 2 and value.opening in "([" and value.closing in ")]":
        low, high = value.items
        if isinstance(low, Term) and isinstance(high, Term):
            ends = [finite(end) for end in (low, high)]
            return Region((Piece(ends[0], ends[1], value.opening == "(", value.closing == ")"),))
    if isinstance(value, Collection) and value.braced and all(isinstance(item, Term) for item in value.items):
        return Region(tuple(point(item) for item in value.items if isinstance(item, Term)))
    if isinstance(value, Term) and value.latex == "R":  # the reals, set in bold
        return complement(Region(()))
    if isinstance(value, Domain):
        raise UnreadableError("a domain among intervals")
    raise UnreadableError("no region")


def finite(end: Term | None) -> Term | None:
    """The end, or None where it is infinity."""
    return None if end is None or end.latex.replace(" ", "").lstrip("+-") == "\\infty" else end


def ordered(region: Region) -> list[Piece]:
    """Its pieces in order, those that touch joined, empty ones left out. Raises UnreadableError for ends in letters."""
    pieces = sorted((piece for piece in region.pieces if _low(piece) <= _high(piece)), key=_low)
    joined: list[Piece] = []
    for piece in pieces:
        if joined and _touch(joined[-1], piece):
            last = joined[-1]
            further = piece if _high(piece) > _high(last) else last
            joined[-1] = Piece(last.low, further.high, last.low_open, further.high_open)
        else:
            joined.append(piece)
    return joined


def complement(region: Region) -> Region:
    gaps: list[Piece] = []
    low: Term | None = None
    low_open = True
    pieces = ordered(region)
    for piece in pieces:
        if piece.low is not None:
            gaps.append(Piece(low, piece.low, low_open, not piece.low_open))
        if piece.high is None:
            return Region(tuple(gaps))
        low, low_open = piece.high, not piece.high_open
    return Region((*gaps, Piece(low, None, low_open, True)))


def combine_regions(one: Region, other: Region, *, union: bool) -> Region:
    if union:
        return Region(tuple(ordered(Region((*one.pieces, *other.pieces)))))
    return Region(tuple(_overlaps(ordered(one), ordered(other))))


def _overlaps(one: Iterable[Piece], other: list[Piece]) -> Iterable[Piece]:
    for first in one:
        for second in other:
            later = max(first, second, key=_low)
            sooner = min(first, second, key=_high)
            piece = Piece(later.low, sooner.high, later.low_open, sooner.high_open)
            if _low(piece) <= _high(piece):
                yield piece


def _low(piece: Piece) -> End:
    return (-math.inf, 0) if piece.low is None else (_value(piece.low), 1 if piece.low_open else 0)


def _high(piece: Piece) -> End:
    return (math.inf, 0) if piece.high is None else (_value(piece.high), -1 if piece.high_open else 0)


def _touch(left: Piece, right: Piece) -> bool:
    (end, stops), (start, begins) = _high(left), _low(right)
    return start < end or (start == end and begins - stops <= 1)


def _value(term: Term) -> float:
    value = float(term.numeral.value) if term.numeral is not None else expressions.real_value(term.latex)
    if value is None:
        raise UnreadableError("an end that is no number")
    return value * term.factor
