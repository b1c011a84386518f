r"""Units that stand after a value: taken off, and compared where both sides name one.

A missing unit is no fault, another one is: `15 cm^2` is not `15 cm`. Words that multiply (`3 \text{ million}`) are part
of the value. A bare letter at a number is a variable (`12m`), unless the question speaks of that unit. Text behind a
value that is no unit and no noun (`7 \text{ or } 8`, `3 \text{ is wrong}`) stays: the answer cannot be read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Unit = tuple[tuple[str, int], ...]

NAMES: dict[str, str] = {
    spelling: names.split()[0]
    for names in (
        "nm nanometer nanometers nanometre nanometres",
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres cms",
        "dm decimeter decimeters decimetre decimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres kms",
        "in inch inches",
        "ft foot feet",
        "yd yard yards yds",
        "mi mile miles",
        "mg milligram milligrams",
        "g gram grams gm",
        "kg kilogram kilograms kgs",
        "oz ounce ounces",
        "lb lbs pound pounds",
        "ton tons tonne tonnes",
        "ms millisecond milliseconds",
        "s sec secs second seconds",
        "min mins minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "ml mL milliliter milliliters millilitre millilitres",
        "l L liter liters litre litres",
        "gal gallon gallons",
        "cent cents",
        "dollar dollars USD usd bucks",
        "GBP gbp",
        "euro euros EUR",
        "rupee rupees Rs rs INR",
        "degree degrees deg",
        "radian radians rad rads",
        "N newton newtons Newton Newtons",
        "J joule joules Joule Joules",
        "kJ kilojoule kilojoules",
        "W watt watts Watt Watts",
        "kW kilowatt kilowatts",
        "V volt volts Volt Volts",
        "A ampere amperes amp amps",
        "ohm ohms Ohm Ohms",
        "Pa pascal pascals Pascal",
        "kPa kilopascal kilopascals",
        "Hz hertz Hertz",
        "K kelvin kelvins Kelvin",
        "C celsius Celsius",
        "F fahrenheit Fahrenheit",
        "mol mole moles mols",
        "acre acres",
        "hectare hectares ha",
        "am a.m. AM A.M.",
        "pm p.m. PM P.M.",
    )
    for spelling in names.split()
}
SPEEDS = {
    "mph": (("h", -1), ("mi", 1)),
    "kmh": (("h", -1), ("km", 1)),
    "kph": (("h", -1), ("km", 1)),
    "kmph": (("h", -1), ("km", 1)),
}
FACTORS = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "millions": 10**6,
    "billion": 10**9,
    "billions": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "dozens": 12,
    "lakh": 10**5,
    "crore": 10**7,
}
SURE = frozenset(re.findall(r"\S+", "mm cm km kg ft lb oz yd hr Hz kW kJ"))  # two letters that are no product
POWERS = {"square": 2, "squared": 2, "sq": 2, "sq.": 2, "cubic": 3, "cubed": 3, "cu": 3, "cu.": 3}
# What no noun is: text with one of these says something about the value.
HEDGES = frozenset(
    re.findall(
        r"\S+",
        """or not no nor neither isn't wrong incorrect false maybe perhaps possibly but if then else unless either least
    most plus minus divided except excluding without undefined impossible infinite infinity unknown mod remainder half
    third zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty""",
    )
)
CURRENCIES = {
    "\\$": "dollar",
    "£": "GBP",
    "€": "euro",
    "₹": "rupee",
    "¥": "yen",
    "USD": "dollar",
    "GBP": "GBP",
    "EUR": "euro",
}
LEADING = re.compile(
    r"(?:\\text\{\s*)?(\\\$|£|€|₹|¥|(?:US|USD|GBP|EUR|Rs\.?)(?![A-Za-z])(?:\s*\\\$)?)\s*\}?\s*(?=[-+.\d\\(])"
)
TRAILING_SIGN = re.compile(r"\s*(\\\$|£|€|₹|¥)$")
ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*\{?)?\s*(?:\\text\{\s*(?:st|nd|rd|th)\s*\}|(?:st|nd|rd|th)(?![A-Za-z]))\}?")
# The run of words, powers and strokes that ends a text.
PHRASE = re.compile(
    r"(?P<unit>(?:(?:\\text\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\Omega\b|\\mu\b|(?<![\\A-Za-z])[A-Za-z]+\.?"
    r"|\^\s*(?:\{\s*-?\d\s*\}|-?\d)|/|\\cdot\b|\s)+))$"
)
WORD = re.compile(
    r"\\Omega|[A-Za-z](?:[A-Za-z'’-]*[A-Za-z])?'?\.?(?:[A-Za-z]\.)?|\^\s*\{?\s*(-?\d)\s*\}?|/|[^\sA-Za-z]"
)
DEGREES = re.compile(r"\s*\^\\circ\s*(?:\\text\{\s*)?([CFK])?\s*\}?$")
CIRCULAR = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
UNIT_FRACTION = re.compile(
    r"\\frac\{\s*(\\text\{[^{}]*\})\s*\}\{\s*((?:\\text\{[^{}]*\}|\^\s*\{?-?\d\}?|\s|\\cdot)+)\}$"
)
HALF_DAY = re.compile(r"(?<=\d)\s*([ap])\.\s?m\.?(?![A-Za-z])")
PERCENT = re.compile(r"\s*(?:\\text\{\s*)?(?:\\?%|\b(?:percent|per\s*cent|percentage|pct)\b\.?)\s*\}?$")
# Bare letters that are taken for a unit only where the question names it.
ASKED = {
    "m": "met(?:er|re)s?|m",
    "g": "grams?|g",
    "s": "seconds?|s",
    "h": "hours?|h",
    "l": "lit(?:er|re)s?|l",
    "N": "newtons?|N",
    "J": "joules?|J",
    "V": "volts?|V",
    "W": "watts?|W",
    "A": "amperes?|A",
    "K": "kelvins?|K",
    "C": "celsius|C",
    "F": "fahrenheit|F",
}


@dataclass(frozen=True)
class Measured:
    """A value's text, what it is multiplied with, and its unit: None where it has none, empty where nobody knows it."""

    value: str
    factor: int = 1
    unit: Unit | None = None
    percent: bool = False


def measured(text: str, question: str = "") -> Measured:
    r"""Take unit, currency, ordinal and percent sign off a plainly set value.

    >>> measured("60 \\text{ km/h}"), measured("12m").value, measured("12m", "How many metres?").value
    (Measured(value='60', factor=1, unit=(('h', -1), ('km', 1)), percent=False), '12m', '12')
    """
    unit: Unit | None = None
    text = UNIT_FRACTION.sub(r"\1/\2", text)
    text = HALF_DAY.sub(r"\\text{\1m}", text)
    leading = LEADING.match(text.lstrip("-+ "))
    if leading is not None:
        sign = text[: len(text) - len(text.lstrip("-+ "))]
        currency = next(
            (CURRENCIES[key] for key in CURRENCIES if key in leading[1]), "dollar" if "US" in leading[1] else "rupee"
        )
        text, unit = sign + text.lstrip("-+ ")[leading.end() :], ((currency, 1),)
    text = ORDINAL.sub("", text, count=1)
    if (percent := PERCENT.search(text)) is not None and text[: percent.start()].strip():
        return Measured(text[: percent.start()].strip(), percent=True, unit=unit)
    if (degrees := DEGREES.search(text)) is not None and not CIRCULAR.search(text):
        named: Unit = (((degrees[1] or "degree"), 1),)
        return Measured(text[: degrees.start()].strip(), unit=named)
    if (sign_after := TRAILING_SIGN.search(text)) is not None and text[: sign_after.start()].strip():
        return Measured(text[: sign_after.start()].strip(), unit=((CURRENCIES.get(sign_after[1], "yen"), 1),))
    factor = 1
    if (phrase := PHRASE.search(text)) is not None:
        start = _beginning(text, phrase.start(), question)
        read = None if start is None else _phrase(text[start:])
        if read is not None and start is not None and text[:start].strip():
            factor, named_unit = read
            text = text[:start].strip()
            unit = unit if named_unit is None or unit is not None else named_unit
    return Measured(text, factor, unit)


def _beginning(text: str, start: int, question: str) -> int | None:
    """Where the phrase that ends the text begins to be one: bare letters at a value may be variables."""
    place = start
    while place < len(text):
        rest = text[place:]
        if rest[0] in " /^" or rest.startswith("\\cdot"):
            # Strokes and powers belong to the value until a unit has begun.
            skipped = re.match(r"\s+|/|\^\s*(?:\{[^{}]*\}|-?\d)|\\cdot\s*", rest)
            place += skipped.end() if skipped else 1
            continue
        if rest.startswith(("\\text", "\\Omega", "\\mu")):
            return place
        bare = re.match(r"[A-Za-z]+\.?", rest)
        if bare is None:
            return None
        word = bare[0].rstrip(".")
        if _is_bare_unit(word, question, spaced=place > 0 and text[place - 1] == " "):
            return place
        place += bare.end()
    return None


def _is_bare_unit(word: str, question: str, *, spaced: bool) -> bool:
    if len(word) == 1:
        asked = ASKED.get(word)
        return asked is not None and re.search(rf"(?<![A-Za-z$\\])(?:{asked})(?![A-Za-z$])", question) is not None
    if len(word) == 2 and word not in SURE:
        return spaced and word in NAMES  # `2mi` and `5rs` are products
    if word in NAMES or word.lower() in NAMES or word in SPEEDS or word in FACTORS or word in POWERS or word == "per":
        return True
    return spaced and len(word) >= 4 and word.islower() and re.search("[aeiouy]", word) is not None


def _phrase(text: str) -> tuple[int, Unit | None] | None:
    """Factor and unit of a phrase; None where it is no unit and no noun."""
    text = re.sub(r"\\text\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r" \1 ", text).replace("\\cdot", " ")
    text = re.sub(r"^\s*[([]\s*([^()\[\]]*?)\s*[)\]]\s*$", r"\1", text)
    factor, powers, sign, awaited, known = 1, dict[str, int](), 1, 1, True
    last: str | None = None
    for match in WORD.finditer(text):
        word = match[0]
        if word == "/" or word.lower() == "per":
            sign = -1
        elif match[1] is not None:
            if last is not None:
                powers[last] = powers[last] // abs(powers[last] or 1) * int(match[1])
        elif word.lower() in FACTORS:
            factor *= FACTORS[word.lower()]
        elif word in ("squared", "cubed") and last is not None:
            powers[last] *= POWERS[word]
        elif word.lower() in POWERS:
            awaited = POWERS[word.lower()]
        elif not (word == "\\Omega" or word[0].isalpha()) or word.lower().rstrip(".") in HEDGES:
            return None
        elif word in SPEEDS:
            powers |= dict(SPEEDS[word])
        else:
            name = _name(word)
            known &= name is not None
            last = name or word
            powers[last] = sign * awaited
            awaited = 1
    if not powers:
        return factor, None
    if powers.keys() & {"C", "F"}:
        powers.pop("degree", None)
    return factor, tuple(sorted(powers.items())) if known else ()


def _name(word: str) -> str | None:
    if word == "\\Omega":
        return "ohm"
    return (
        NAMES.get(word)
        or NAMES.get(word.rstrip("."))
        or (NAMES.get(word.rstrip(".").lower()) if len(word) > 1 else None)
    )


def same_unit(one: Unit | None, other: Unit | None) -> bool:
    """Tell whether two units are not known to differ."""
    return not one or not other or one == other
