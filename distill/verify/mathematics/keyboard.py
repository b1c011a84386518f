r"""Mathematics as people type it, to LaTeX: `sqrt(3)/2`, `2pi`, `x**2`, `3.2e5`, `log_2(7)`; and LaTeX as models
shorten it: `\frac38`, `\sqrt3`, `2^10`.
"""

from __future__ import annotations

import re

from distill.verify.typeset import closes_at

TEXT = r"\\(?:text|mathbb|mathcal|operatorname|begin|end)\s*\{[^{}]*\}"
FUNCTIONS = re.findall(
    r"\S+",
    "arcsin arccos arctan arcsinh arccosh arctanh sinh cosh tanh sin cos tan cot sec csc log ln lg exp sqrt gcd lcm max"
    " min",
)
NAMES = {
    **{name: f"\\{name} " for name in FUNCTIONS},
    **{name: f"\\{name} " for name in re.findall(r"\S+", "pi theta alpha beta gamma lambda omega phi sigma infty")},
    **{
        "asin": "\\arcsin ",
        "acos": "\\arccos ",
        "atan": "\\arctan ",
        "cbrt": "\\sqrt[3]",
        "Pi": "\\pi ",
        "PI": "\\pi ",
    },
    **dict.fromkeys(("infinity", "Infinity", "inf", "Inf", "oo"), "\\infty "),
}
WORD = re.compile(rf"{TEXT}|\\[A-Za-z]+|[A-Za-z]+(?![A-Za-z])")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")
TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
OPERATORS = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!=|/="), r"\\ne "),
    (re.compile(r"\+\s*/\s*-|\+-"), r"\\pm "),
    (re.compile(r"->|=>"), r"\\to "),
    (re.compile(r"~=|=~"), r"\\approx "),
    (re.compile(r"\*"), r"\\cdot "),
)
LONG_POWER = re.compile(r"\^\s*(-?\d{2,}|-\s*\d+|-\s*[A-Za-z](?![A-Za-z]))")
INVERSE = re.compile(r"\\(sin|cos|tan|cot|sec|csc|sinh|cosh|tanh)\s*\^\s*\{\s*-\s*1\s*\}")
ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\\?[A-Za-z]+|\d+|.)?")
FRACTION = re.compile(r"\\frac\s*")
NOT = re.compile(r"\\not\s*(=|\\in|<|>)")


def to_latex(text: str) -> str:
    r"""The text in LaTeX that has braces where LaTeX's own rules would do without.

    >>> to_latex("sqrt(3)/2 + 2pi"), to_latex("3.2e5"), to_latex("\\frac38x**10")
    ('\\sqrt{3}/2 + 2\\pi ', '3.2\\times 10^{5}', '\\frac{3}{8}x^{10}')
    """
    text = NOT.sub(lambda match: "\\ne " if match[1] == "=" else match[0], text)
    text = TIMES_TEN.sub("\\\\times ", text)
    text = SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    for pattern, written in OPERATORS:
        text = pattern.sub(written, text)
    text = WORD.sub(lambda word: NAMES.get(word[0], word[0]), text)
    text = _in_braces(text, "^")
    text = LONG_POWER.sub(lambda power: "^{" + power[1].replace(" ", "") + "}", text)
    text = INVERSE.sub(lambda function: f"\\arc{function[1]} ", text)
    text = _roots(text)
    text = _in_braces(text, "\\exp ").replace("\\exp{", "e^{").replace("\\exp {", "e^{")
    return _fractions(text)


def closing_parenthesis(text: str, start: int) -> int | None:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def _in_braces(text: str, before: str) -> str:
    """Turn the parentheses right behind `before` into braces."""
    place = 0
    while (place := text.find(before, place)) >= 0:
        place += len(before)
        start = place + len(text[place:]) - len(text[place:].lstrip())
        if text[start : start + 1] == "(" and (end := closing_parenthesis(text, start)) is not None:
            text = f"{text[:place].rstrip()}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
    return text


def _roots(text: str) -> str:
    parts: list[str] = []
    place = 0
    while (match := ROOT.search(text, place)) is not None:
        parts.append(text[place : match.start()] + "\\sqrt" + (match[1] or ""))
        argument = match[2] or ""
        start = match.start(2) if argument else match.end()
        if argument == "{":
            place = start
            continue
        if argument == "(" and (end := closing_parenthesis(text, start)) is not None:
            text = f"{text[:start]}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
            place = start
            continue
        if argument and argument[0].isalpha():
            argument = argument[0]
        parts.append("{" + argument + "}")
        place = start + len(argument)
    return "".join(parts) + text[place:]


def _fractions(text: str) -> str:
    """Put both arguments of every fraction in braces: `\\frac38`, `\\frac{3}8`, `\\frac 3 8`."""
    place = 0
    while (match := FRACTION.search(text, place)) is not None:
        start = match.start() + len("\\frac")
        rest = text[match.end() :]
        arguments = []
        for _ in range(2):
            rest = rest.lstrip()
            if rest.startswith("{"):
                end = closes_at(rest, 0)
                if end is None:
                    return text
                argument, rest = rest[1:end], rest[end + 1 :]
            else:
                command = re.match(r"\\[A-Za-z]+|.", rest, re.DOTALL)
                if command is None:
                    return text
                argument, rest = command[0], rest[command.end() :]
            arguments.append(argument.strip())
        text = f"{text[:start]}{{{arguments[0]}}}{{{arguments[1]}}}{rest}"
        place = start
    return text
