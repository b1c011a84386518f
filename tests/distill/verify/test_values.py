"""Numbers and terms: equal where they are, to the last digit, and nowhere else."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings, strategies as st

from distill.verify.mathematics.comparison import same
from distill.verify.mathematics.expressions import UnreadableTermError, parse
from distill.verify.mathematics.numerals import DOUBLE_DIGITS, read_numeral, same_number
from distill.verify.mathematics.reading import prepare, read
from distill.verify.mathematics.units import measured, same_unit
from distill.verify.mathematics.values import UnreadableError


def recurring(value: Fraction) -> str:
    """Long division, the period under an overline."""
    whole, rest = divmod(value.numerator, value.denominator)
    seen: dict[int, int] = {}
    digits = ""
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(rest * 10, value.denominator)
        digits += str(digit)
    if not rest:
        return f"{whole}.{digits}"
    return f"{whole}.{digits[: seen[rest]]}\\overline{{{digits[seen[rest] :]}}}"


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_a_fraction_is_its_decimal_with_its_period(above: int, below: int) -> None:
    fraction = read_numeral(f"\\frac{{{above}}}{{{below}}}")
    decimal = read_numeral(recurring(Fraction(above, below)))
    assert fraction is not None
    assert decimal is not None
    assert fraction.value == decimal.value == Fraction(above, below)


@given(st.integers(1, 10_000), st.integers(2, 500), st.integers(1, 12))
def test_a_rounded_decimal_stands_for_a_fraction_with_six_places_alone(above: int, below: int, places: int) -> None:
    value = Fraction(above, below)
    assume((value * 10**places).denominator > 1 and value > 1)
    with localcontext(prec=60):
        exact = Decimal(above) / Decimal(below)
        rounded = exact.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN)
        off = rounded + Decimal(1).scaleb(-places)
    fraction, near, far = (read_numeral(text) for text in (f"{above}/{below}", str(rounded), str(off)))
    assert fraction
    assert near
    assert far
    assert same_number(fraction, near) == (places >= 6 and near.decimals is not None)
    if far.significant < DOUBLE_DIGITS[0]:  # the last digits of more are a double's noise
        assert not same_number(fraction, far)


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(20, 300), st.sampled_from([-1, 1]), st.integers(1, 3))
def test_powers_equal_themselves_and_not_their_neighbours(base: int, exponent: int, sign: int, step: int) -> None:
    power = f"{base}^{{{sign * exponent}}}"
    split = f"{base}^{{{sign * (exponent - step)}}} \\cdot {base}^{{{sign * step}}}"
    assert same(read(power), read(split))
    assert not same(read(power), read(f"{base}^{{{sign * (exponent + step)}}}"))
    if sign > 0:
        assert not same(read(power), read(str(base**exponent + step)))


@pytest.mark.parametrize(
    "text",
    ["7?8", "7|8", "7 \\to 8", "8 \\cancel{7}", "\\neq 7", "7 \\cup 8", "4=5", "x=5=6", "\\frac{1}{2",
     "7 \\\\ 8", "<7", "(" * 50 + "x" + ")" * 50],
)  # fmt: skip
def test_what_says_more_than_a_value_is_not_read(text: str) -> None:
    with pytest.raises(UnreadableError):
        read(prepare(text))


@pytest.mark.parametrize("text", ["__import__('os')", "f.real", "x; y", "\\input{a}", "\\write18{ls}", '"a"'])
def test_no_python_and_no_unknown_command_is_a_term(text: str) -> None:
    with pytest.raises(UnreadableTermError):
        parse(text)


def test_units_are_known_by_kind_and_power() -> None:
    def unit(text: str, question: str = "") -> object:
        return measured(prepare(text), question).unit

    assert unit("15 cm^2") == unit("15 \\text{ square centimetres}") == unit("15 \\mathrm{cm}^2") == (("cm", 2),)
    assert unit("60 \\text{ km/h}") == unit("60\\,\\mathrm{km\\,h^{-1}}") == (("h", -1), ("km", 1))
    assert unit("12m") is None
    assert unit("12m", "How many metres?") == (("m", 1),)
    assert unit("60 \\text{ students}") == ()
    assert measured("7 \\text{ or more}").value == "7 \\text{ or more}"
    assert measured("3 \\text{ million}").factor == 10**6
    assert [same_unit((("cm", 2),), other) for other in ((("cm", 1),), None, ())] == [False, True, True]
