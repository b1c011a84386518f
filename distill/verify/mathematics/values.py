"""What an answer can be, once it is read: a term, words, a tuple, a set, a region of numbers, an equation.

`Term` is the leaf. Texts in here are plainly set LaTeX (`distill.verify.typeset`, `keyboard`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.verify.mathematics.numerals import Numeral
from distill.verify.mathematics.units import Unit


class UnreadableError(ValueError):
    """A text that is no answer that we know how to read."""


@dataclass(frozen=True)
class Term:
    """One value: `numeral` where it is a number as such; times `factor` (`3 million`); in `unit`, or a percentage."""

    latex: str
    numeral: Numeral | None = None
    factor: int = 1
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """A text, a name, or letters that are no product."""

    key: str


@dataclass(frozen=True)
class Row:
    """A tuple, a vector, or an interval that nobody can tell from one: order counts."""

    items: tuple[Value, ...]
    opening: str
    closing: str


@dataclass(frozen=True)
class Collection:
    """Values in no order, in braces (a set) or only in line."""

    items: tuple[Value, ...]
    braced: bool = False


@dataclass(frozen=True)
class Piece:
    """An interval; None is infinite, a point has twice the same end."""

    low: Term | None
    high: Term | None
    low_open: bool = True
    high_open: bool = True


@dataclass(frozen=True)
class Region:
    """A union of intervals."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Domain:
    """`\\mathbb{Z}` and its like, by letter."""

    letter: str


@dataclass(frozen=True)
class Grid:
    """A matrix; `vmatrix` is a determinant, and another thing."""

    rows: tuple[tuple[Term, ...], ...]
    determinant: bool


@dataclass(frozen=True)
class Equation:
    left: str
    right: str


@dataclass(frozen=True)
class Inequality:
    """`left - right` against zero, in several variables."""

    left: str
    sign: Literal["<", "\\le", "\\ne"]
    right: str


@dataclass(frozen=True)
class Named:
    """`x = 5`, `f(x) = 2x`, `m \\in [0, 4)`."""

    name: str
    value: Value


@dataclass(frozen=True)
class System:
    """Several names with their values, in the order in which they stand."""

    values: tuple[Named, ...]


@dataclass(frozen=True)
class Ratio:
    """`2:3:5`, and times of day."""

    items: tuple[Term, ...]
    unit: Unit | None = None


@dataclass(frozen=True)
class Based:
    """A numeral in a base that is written at it."""

    digits: str
    base: str


@dataclass(frozen=True)
class Residue:
    """`3 \\pmod 7`."""

    value: Term
    modulus: Term


@dataclass(frozen=True)
class Applied:
    """Something with arguments that is no function that we know: `\\mathcal{N}(0, 4)`."""

    head: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Described:
    """A set by a description that we cannot turn into a region; equal to the same description alone."""

    key: str


Value = (
    Term
    | Words
    | Row
    | Collection
    | Region
    | Domain
    | Grid
    | Equation
    | Inequality
    | Named
    | System
    | Ratio
    | Based
    | Residue
    | Applied
    | Described
)
