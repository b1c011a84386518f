"""Answers of the reference's value that are no answers all the same. Looked for only where the values are equal.

Equality of values is generous: the question `1+2` has the value of its answer, math-verify drops units and the
subscripts that name a number's base. Only plain contradictions are taken up; a missing unit or base is no fault.
"""

from __future__ import annotations

import re

OPERATION = re.compile(
    r"[-+*!^=]|\\(?:sqrt|cdot|times|div|sum|prod|int|lim|log|ln|sin|cos|tan|binom|max|min|lfloor|lceil)"
)
PLAIN_NUMBER = re.compile(r"[-+]?[\d.,]+(?:/[\d.]+)?|[-+]?\\[dt]?frac\{?\d+\}?\{?\d+\}?|[-+]?\w+")
LOOKS = re.compile(r"\\left|\\right|\\[,;:! ]|\\displaystyle|\\quad|[\s$]|\\[()\[\]]")
BASE = re.compile(r"\d_\{?(?:\\text\{)?(\d+|[a-z]+)\}*$")
UNIT = re.compile(
    r"(?:\\(?:text|mathrm|mbox|operatorname)\s*\{\s*([A-Za-z]+)\.?\s*\}|(?<![A-Za-z\\])([A-Za-z]+))\s*(?:\^\s*\{?\d\}?)?$"
)

UNITS: dict[str, str] = {
    spelling: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "oz ounce ounces",
        "lb lbs pound pounds",
        "s sec second seconds",
        "min minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "year years",
        "ml milliliter milliliters millilitre millilitres",
        "l liter liters litre litres",
        "cent cents",
        "dollar dollars",
        "degree degrees",
        "radian radians rad",
    )
    for spelling in names.split()
}


def evasion(question: str, reference: str, answer: str) -> str | None:
    r"""Tell why `answer`, whose value is that of `reference`, is wrong nevertheless; None where it is not.

    >>> evasion("What is $1 + 2$?", "3", "1+2")
    'repeats the question'
    >>> evasion("How far?", "3 \\text{ km}", "3 \\text{ miles}")
    'in mi, not in km'
    """
    if _repeats(question, reference, answer):
        return "repeats the question"
    for read in (_base, _unit):
        wanted, given = read(reference), read(answer)
        if wanted and given and wanted != given:
            return f"in {given}, not in {wanted}"
    return None


def _repeats(question: str, reference: str, answer: str) -> bool:
    """Tell whether it is a calculation that stands in the question, where the reference is what comes of it."""
    given, wanted = LOOKS.sub("", answer), LOOKS.sub("", reference)
    if not OPERATION.search(given) or PLAIN_NUMBER.fullmatch(given):
        return False
    asked = LOOKS.sub("", question)
    return given in asked and wanted != given and not OPERATION.search(wanted.lstrip("-"))


def _base(text: str) -> str | None:
    found = BASE.search(LOOKS.sub("", text))
    return f"base {found[1]}" if found else None


def _unit(text: str) -> str | None:
    found = UNIT.search(text.strip().strip("$").strip())
    return UNITS.get((found[1] or found[2]).lower()) if found else None
