"""Worked reasoning for the pico families: from a problem's own numbers to the lines a person would write down.

A teacher of our own has to learn reasoning from somewhere: these are its text book. Every line is one elementary step
(`48 + 17 = 65`) in one surface form, so that what a small student knows as a fact is what a trace asks it to do.
`worked_solution` is the whole text in the trace format, `worked_steps` the lines alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from distill.errors import DataError, nearest
from distill.problems.reasoning_gym import entry_of
from distill.records import Problem

Metadata = Mapping[str, Any]


def worked_solution(problem: Problem) -> str:
    """The trace a perfect teacher would write: reasoning between think tags, then the boxed answer."""
    steps = "\n".join(worked_steps(problem))
    return f"<think>\n{steps}\n</think>\n\n\\boxed{{{problem.answer}}}"


def worked_steps(problem: Problem) -> list[str]:
    """One line a step. Raises DataError for a family without worked reasoning."""
    try:
        steps = WORKED[problem.source]
    except KeyError:
        raise DataError(f"no worked reasoning for {problem.source!r}; {nearest(problem.source, WORKED)}") from None
    metadata: Metadata = entry_of(problem)["metadata"]
    return steps(metadata)


def chain_sum(metadata: Metadata) -> list[str]:
    total, *rest = metadata["expression"].split()
    steps = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = _apply(operator, int(total), int(term))
        steps.append(f"{total} {operator} {term} = {result}")
        total = str(result)
    return steps


def products(metadata: Metadata) -> list[str]:
    a, b = (int(term) for term in metadata["expression"].split(" * "))
    return _long_multiplication(a, b)


def lcm(metadata: Metadata) -> list[str]:
    a, b = metadata["numbers"]
    steps, divisor = _euclid(a, b)
    quotient = a // divisor
    return [*steps, f"{a} / {divisor} = {quotient}", *_long_multiplication(quotient, b)]


def fraction_simplification(metadata: Metadata) -> list[str]:
    numerator, denominator = metadata["numerator"], metadata["denominator"]
    steps, divisor = _euclid(numerator, denominator)
    return [*steps, *(f"{value} / {divisor} = {value // divisor}" for value in (numerator, denominator))]


def basic_arithmetic(metadata: Metadata) -> list[str]:
    """Rewrite the expression one operation at a time: innermost parentheses, then products, then left to right."""
    tokens = metadata["expression"].split()
    steps = []
    while len(tokens) > 1:
        close = tokens.index(")") if ")" in tokens else len(tokens)
        opened = max((i for i in range(close) if tokens[i] == "("), default=-1)
        if close - opened > 2:
            at = next((i for i in range(opened + 1, close) if tokens[i] == "*"), opened + 2)
            tokens[at - 1 : at + 2] = [str(_apply(tokens[at], int(tokens[at - 1]), int(tokens[at + 1])))]
        steps.append(f"= {' '.join(_without_idle_parentheses(tokens))}")
    return steps


def leg_counting(metadata: Metadata) -> list[str]:
    steps, legs = [], []
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # seconds to import: only where it is needed

    for animal, count in metadata["animals"].items():
        legs.append(count * ANIMALS[animal])
        steps.append(f"{count} {animal}{'s' if count > 1 else ''}: {count} * {ANIMALS[animal]} = {legs[-1]}")
    total = legs[0]
    for more in legs[1:]:
        steps.append(f"{total} + {more} = {total + more}")
        total += more
    return steps


def complex_arithmetic(metadata: Metadata) -> list[str]:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i."""
    a, b, c, d = (int(part) for part in (*metadata["num1"], *metadata["num2"]))
    return [
        f"{a} * {c} = {a * c}",
        f"{b} * {d} = {b * d}",
        f"{a * c} - {b * d} = {a * c - b * d}",
        f"{a} * {d} = {a * d}",
        f"{b} * {c} = {b * c}",
        f"{a * d} + {b * c} = {a * d + b * c}",
    ]


def simple_geometry(metadata: Metadata) -> list[str]:
    angles = [int(angle) for angle in metadata["known_angles"]]
    steps, total = [], angles[0]
    for angle in angles[1:]:
        steps.append(f"{total} + {angle} = {total + angle}")
        total += angle
    sides = metadata["n_sides"]
    whole = 180 * (sides - 2)
    return [
        *steps,
        f"{sides} - 2 = {sides - 2}",
        f"{sides - 2} * 180 = {whole}",
        f"{whole} - {total} = {whole - total}",
    ]


WORKED: dict[str, Callable[[Metadata], list[str]]] = {
    "chain_sum": chain_sum,
    "products": products,
    "lcm": lcm,
    "basic_arithmetic": basic_arithmetic,
    "leg_counting": leg_counting,
    "complex_arithmetic": complex_arithmetic,
    "fraction_simplification": fraction_simplification,
    "simple_geometry": simple_geometry,
}


def _without_idle_parentheses(tokens: list[str]) -> list[str]:
    """Drop, in place, parentheses around a single number."""
    at = 0
    while at + 2 < len(tokens):
        if tokens[at] == "(" and tokens[at + 2] == ")":
            tokens[at : at + 3] = [tokens[at + 1]]
            at = max(0, at - 1)
        else:
            at += 1
    return tokens


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    high, low = max(a, b), min(a, b)
    steps = []
    while low:
        steps.append(f"{high} mod {low} = {high % low}")
        high, low = low, high % low
    return steps, high


def _long_multiplication(a: int, b: int) -> list[str]:
    """`a * b` by the tens and ones of the second factor; the larger single-digit factor stays whole."""
    tens, ones = b - b % 10, b % 10
    if a < 10 or not tens or not ones:
        return [f"{a} * {b} = {a * b}"]
    return [
        f"{a} * {tens} = {a * tens}",
        f"{a} * {ones} = {a * ones}",
        f"{a * tens} + {a * ones} = {math.prod((a, b))}",
    ]
