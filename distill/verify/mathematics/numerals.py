r"""Numbers as they are written, read exactly: integers, decimals, recurring ones, fractions, mixed numbers.

A decimal keeps how many digits it was given to, because equality depends on it: `0.333333` is one third to the digits
that it has, `0.33` is not enough of it, and `1.0000001` is not `1.0000002`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 4_000  # Python itself refuses to read longer integers
MAX_EXPONENT = 4_000
MIN_DECIMALS = 6  # of a decimal that stands for a value with more digits than it has
MIN_SIGNIFICANT = 5
DOUBLE_DIGITS = (15, 17)  # as programs print a double: its last digit or two are noise
DOUBLE_NOISE = Fraction(1, 10**14)

DECIMAL = r"(?:\d+(?:,\d{3})*\.?\d*|\.\d+)"
PLAIN = re.compile(rf"({DECIMAL})")
SLASH = re.compile(rf"({DECIMAL})/({DECIMAL})")
FRACTION = re.compile(r"\\frac\{([-+]?)(\d+)\}\{([-+]?)(\d+)\}")
MIXED = re.compile(r"(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|[ ]+(\d+)/(\d+)|\s*\+\s*\\frac\{(\d+)\}\{(\d+)\})")
SCIENTIFIC = re.compile(rf"({DECIMAL})(?:\\times|\\cdot)10\^(?:\{{([-+]?\d+)\}}|([-+]?\d))")
RECURRING = re.compile(
    r"(\d*\.\d*)(?:\\dot\s*\{(\d)\}(\d*)\\dot\s*\{(\d)\}|\\(?:overline|bar|dot)\{(\d+)\}|\((\d+)\)|\\(?:bar|dot)(\d))"
)
ENDLESS = re.compile(r"(\d*\.\d+)(?:\\ldots|\.\.\.*)")
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?")


@dataclass(frozen=True)
class Numeral:
    """`decimals` is None where the number is no decimal fraction; `endless` is one that was said to go on (`...`)."""

    value: Fraction
    decimals: int | None = None
    significant: int = 0
    endless: bool = False

    def __neg__(self) -> Numeral:
        return Numeral(-self.value, self.decimals, self.significant, self.endless)


def read_numeral(text: str) -> Numeral | None:
    r"""The number that a plainly set text is, if it is nothing but one.

    >>> read_numeral("1,250.00").value, read_numeral("7\\frac{3}{4}").value, read_numeral("0.1\\overline{6}").value
    (Fraction(1250, 1), Fraction(31, 4), Fraction(1, 6))
    """
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    negative = False
    while text[:1] in ("-", "+"):
        negative ^= text[0] == "-"
        text = text[1:].strip()
    if len(text) > 2 and text.startswith("(") and text.endswith(")") and re.fullmatch(r"\(-?\d+\)", text):
        text, negative = text[1:-1].lstrip("-"), negative ^ text.startswith("(-")
    found = _unsigned(text)
    return -found if found is not None and negative else found


def _unsigned(text: str) -> Numeral | None:
    if (mixed := MIXED.fullmatch(text)) is not None:
        whole, part, parts_of_one = (int(digits) for digits in mixed.groups() if digits is not None)
        # `6\frac{10}{3}` is a product or a slip; only a proper part makes a mixed number.
        return Numeral(whole + Fraction(part, parts_of_one)) if 0 < part < parts_of_one else None
    text = re.sub(r"\s", "", text)
    if PLAIN.fullmatch(text):
        return _decimal(text)
    if (parts := FRACTION.fullmatch(text)) is not None and int(parts[4]):
        sign = -1 if (parts[1] == "-") != (parts[3] == "-") else 1
        return Numeral(sign * Fraction(int(parts[2]), int(parts[4])))
    if (parts := SLASH.fullmatch(text)) is not None:
        above, below = _decimal(parts[1]), _decimal(parts[2])
        return Numeral(above.value / below.value) if above and below and below.value else None
    if (parts := SCIENTIFIC.fullmatch(text)) is not None:
        factor, exponent = _decimal(parts[1]), int(parts[2] or parts[3])
        if factor is None or abs(exponent) > MAX_EXPONENT:
            return None
        return Numeral(factor.value * Fraction(10) ** exponent)
    return _recurring(text)


def _decimal(text: str) -> Numeral | None:
    if "," in text:
        if not GROUPED.fullmatch(text):
            return None
        text = text.replace(",", "")
    whole, point, places = text.partition(".")
    if not (whole or places):
        return None
    value = Fraction(f"{whole or 0}.{places or 0}")
    if not point or not places.strip("0"):
        return Numeral(value)
    return Numeral(value, len(places), len((whole + places).lstrip("0")))


def _recurring(text: str) -> Numeral | None:
    if (parts := RECURRING.fullmatch(text)) is not None:
        return Numeral(_with_period(parts[1], "".join(part for part in parts.groups()[1:] if part)))
    if (parts := ENDLESS.fullmatch(text)) is None:
        return None
    digits = parts[1].partition(".")[2]
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        if digits.endswith(period * 2) and period.strip("0"):
            return Numeral(_with_period(parts[1], period))
    read = _decimal(parts[1])
    return None if read is None else Numeral(read.value, len(digits), read.significant, endless=True)


def _with_period(start: str, period: str) -> Fraction:
    whole, _, places = start.partition(".")
    scale = 10 ** len(places)
    return Fraction(f"{whole or 0}.{places or 0}") + Fraction(int(period), scale * (10 ** len(period) - 1))


def same_number(one: Numeral, other: Numeral) -> bool:
    """Equal exactly, or a decimal that stands for a value which has more digits than it was given to.

    Two decimals are equal exactly: both were meant.
    """
    if one.value == other.value:
        return True
    if one.decimals is not None and other.decimals is None:
        return stands_for(one, other.value)
    if other.decimals is not None and one.decimals is None:
        return stands_for(other, one.value)
    if one.decimals is not None:
        return any(_is_noise(a, b.value) for a, b in ((one, other), (other, one)))
    return False


def stands_for(decimal: Numeral, value: Fraction) -> bool:
    """Tell whether `decimal` is `value` rounded to its digits, enough of them (cut off, where it was said to go on)."""
    if decimal.decimals is None:
        return False
    scaled = value * 10**decimal.decimals
    if scaled.denominator == 1:
        return value.denominator != 1 and _is_noise(decimal, value)
    if _is_noise(decimal, value):
        return True
    if decimal.decimals < MIN_DECIMALS or decimal.significant < MIN_SIGNIFICANT:
        return False
    error: Fraction = abs(decimal.value - value) * 10**decimal.decimals
    return error < 1 if decimal.endless else error <= Fraction(1, 2)


def rounds_to(decimal: Numeral, value: Fraction) -> bool:
    """Tell whether `value` rounds to `decimal`, however few digits that has: what may stand after an `\\approx`."""
    if decimal.decimals is None and (decimal.value.denominator != 1 or value.denominator == 1):
        return decimal.value == value
    unit = Fraction(1, 10 ** (decimal.decimals or 0))
    return abs(decimal.value - value) <= unit


def _is_noise(decimal: Numeral, value: Fraction) -> bool:
    shortest, longest = DOUBLE_DIGITS
    close = abs(decimal.value - value) <= abs(value) * DOUBLE_NOISE
    return close and shortest <= decimal.significant <= longest
