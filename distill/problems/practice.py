"""Text to practise on that is no problem's solution: elementary facts, step sequences on their own, reading exercises.

All lines have the surface form of `distill.problems.worked`. A question occurs in reading exercises alone, and there
nothing is worked out: its items are copied in order, or each is put through one unrelated step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from distill.problems.worked import worked_steps
from distill.records import Problem


def elementary_fact(rng: random.Random) -> str:
    """One line of arithmetic that a single step of a worked solution may need."""
    kind = rng.choices(("add", "times", "tens", "mod", "divide", "small"), weights=(4, 2, 1, 3, 1, 1))[0]
    if kind == "add":
        left, right, sign = (
            rng.randint(-200, 720),
            rng.choice((rng.randint(1, 99), rng.randint(1, 720))),
            rng.choice("+-"),
        )
        return f"{left} {sign} {right} = {left + right if sign == '+' else left - right}"
    if kind == "times":
        left, right = rng.randint(0, 99), rng.randint(0, 9)
        return f"{left} * {right} = {left * right}"
    if kind == "tens":
        left, right = rng.randint(2, 99), 10 * rng.randint(1, 9)
        return f"{left} * {right} = {left * right}"
    if kind == "mod":
        low = rng.randint(1, rng.choice((30, 60, 150)))
        high = rng.randint(low, min(300, 6 * low))
        return f"{high} mod {low} = {high % low}"
    if kind == "divide":
        divisor, quotient = rng.randint(1, 30), rng.randint(1, 30)
        return f"{divisor * quotient} / {divisor} = {quotient}"
    left, right, sign = rng.randint(-81, 81), rng.randint(-81, 81), rng.choice("+-")
    return f"{left} {sign} {right} = {left + right if sign == '+' else left - right}"


def elementary_facts(rng: random.Random, num_lines: int) -> str:
    return "\n".join(elementary_fact(rng) for _ in range(num_lines))


def step_sequence(problem: Problem, rng: random.Random) -> str:
    """A run of consecutive worked steps, without the question: often all of them, sometimes a part."""
    steps = worked_steps(problem)
    if rng.random() < 0.5 or len(steps) < 3:
        return "\n".join(steps)
    start = rng.randint(0, len(steps) - 2)
    return "\n".join(steps[start : rng.randint(start + 2, len(steps))])


def mixed_steps(problems: Sequence[Problem], rng: random.Random, num_lines: int) -> str:
    """Single steps of many problems in random order: facts as they occur, weighted as they occur."""
    lines = [rng.choice(worked_steps(rng.choice(problems)) or [elementary_fact(rng)]) for _ in range(num_lines)]
    return "\n".join(lines)


def reading_exercise(problem: Problem, rng: random.Random) -> str:
    """A question's text, then its items one a line; for numbers at times with one fixed operation on each of them."""
    items = _items(problem)
    if rng.random() < 0.5 and all(item.lstrip("-").isdigit() for item in items):
        sign, constant = rng.choice("+-*"), rng.randint(1, 9)
        apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign]
        items = [f"{item} {sign} {constant} = {apply(int(item), constant)}" for item in items]
    return "\n".join([problem.prompt.strip(), *items])


def _items(problem: Problem) -> list[str]:
    metadata = problem.metadata["entry"]["metadata"]
    if problem.source == "basic_arithmetic":
        return [metadata["expression"]]
    if problem.source == "leg_counting":
        return [f"{count} {animal}{'s' if count > 1 else ''}" for animal, count in metadata["animals"].items()]
    return re.findall(r"(?<![\w.])-?\d+(?=\.0|\b)", problem.prompt.replace("- ", "-"))
