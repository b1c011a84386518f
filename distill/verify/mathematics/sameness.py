"""Whether two terms are the same: their values, with factors and percent signs, and their units where both have one."""

from __future__ import annotations

from fractions import Fraction

from distill.verify.mathematics import expressions
from distill.verify.mathematics.numerals import Numeral, same_number
from distill.verify.mathematics.units import same_unit
from distill.verify.mathematics.values import Term


def same_terms(reference: Term, given: Term) -> bool:
    """Raises UnreadableTermError for a term that turns out to be none."""
    if not same_unit(reference.unit, given.unit):
        return False
    if reference.percent == given.percent:
        return _same(reference, given, Fraction(reference.factor), Fraction(given.factor))
    hundredths = [Fraction(term.factor, 100 if term.percent else 1) for term in (reference, given)]
    if _same(reference, given, *hundredths):
        return True
    # `35` for `35\\%`: the sign is a unit that may be missing, but not from a share of one.
    bare = given if reference.percent else reference
    is_share = bare.numeral is None or abs(bare.numeral.value) < 1
    return not is_share and _same(reference, given, Fraction(1), Fraction(1))


def _same(one: Term, other: Term, by: Fraction, other_by: Fraction) -> bool:
    if one.numeral is not None and other.numeral is not None:
        return same_number(_scaled(one.numeral, by), _scaled(other.numeral, other_by))
    if expressions.same_value(_latex(one, by), _latex(other, other_by)):
        return True
    for decimal, term, factor in ((one, other, other_by / by), (other, one, by / other_by)):
        if decimal.numeral is not None and decimal.numeral.decimals and expressions.is_constant(term.latex):
            return expressions.decimal_stands_for(decimal.numeral, _latex(term, factor))
    return False


def _scaled(number: Numeral, by: Fraction) -> Numeral:
    if by == 1:
        return number
    value = number.value * by
    if number.decimals is None or value.denominator == 1 or by != Fraction(1, 100):
        return Numeral(value)
    return Numeral(value, number.decimals + 2, number.significant)


def _latex(term: Term, by: Fraction) -> str:
    if term.numeral is not None:
        value = term.numeral.value * by
        return (
            f"({value.numerator})"
            if value.denominator == 1
            else f"(\\frac{{{value.numerator}}}{{{value.denominator}}})"
        )
    if by == 1:
        return term.latex
    return f"(\\frac{{{by.numerator}}}{{{by.denominator}}})\\cdot({term.latex})"
