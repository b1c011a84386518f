"""Practice text: true line by line, in the surface form of worked steps, and never a question beside its solution."""

from __future__ import annotations

import itertools
import random
import re
import secrets
from fractions import Fraction

import pytest

from distill.problems.practice import elementary_fact, elementary_facts, mixed_steps, reading_exercise, step_sequence
from distill.problems.stream import pico_families, stream
from distill.problems.worked import worked_steps
from distill.records import Problem

FRESH_SEED = secrets.randbelow(2**31)
EQUATION = re.compile(r"(?:\d+ [a-z ]+: )?(-?\d+) (\+|-|\*|/|mod) (-?\d+) = (-?\d+)")
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
    "mod": lambda a, b: a % b,
}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(FRESH_SEED)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [
        problem
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=FRESH_SEED, split="train"), 200)
    ]


def is_true(line: str) -> bool:
    left, operator, right, result = EQUATION.fullmatch(line).groups()
    return APPLY[operator](int(left), int(right)) == int(result)


def test_elementary_facts_are_true(rng: random.Random) -> None:
    facts = [elementary_fact(rng) for _ in range(5_000)]
    assert [fact for fact in facts if not is_true(fact)] == []
    assert len(set(facts)) > 2_500
    text = elementary_facts(rng, 12)
    assert len(text.split("\n")) == 12
    assert all(is_true(line) for line in text.split("\n"))


def test_facts_hold_every_operation_that_steps_need(rng: random.Random, problems: list[Problem]) -> None:
    def operations(lines: list[str]) -> set[str]:
        return {match[2] for line in lines if (match := EQUATION.fullmatch(line))}

    steps = [line for problem in problems for line in worked_steps(problem)]
    assert operations(steps) == operations([elementary_fact(rng) for _ in range(2_000)]) == set(APPLY)


def test_a_sequence_is_a_run_of_worked_steps_alone(rng: random.Random, problems: list[Problem]) -> None:
    whole = 0
    for problem in problems:
        steps = worked_steps(problem)
        lines = step_sequence(problem, rng).split("\n")
        assert any(lines == steps[start : start + len(lines)] for start in range(len(steps))), (problem, lines)
        assert len(lines) >= min(2, len(steps))
        whole += lines == steps
    assert len(problems) / 2 < whole < len(problems)


def test_mixed_steps_are_steps_of_several_problems(rng: random.Random, problems: list[Problem]) -> None:
    steps = {line for problem in problems for line in worked_steps(problem)}
    for _ in range(50):
        lines = mixed_steps(problems, rng, 12).split("\n")
        assert len(lines) == 12
        assert all(line in steps for line in lines)
        assert not any(
            set(worked_steps(problem)) <= set(lines) for problem in problems if len(set(worked_steps(problem))) > 4
        )


def test_practice_without_a_question_holds_no_question(rng: random.Random, problems: list[Problem]) -> None:
    for problem in problems:
        for text in (step_sequence(problem, rng), mixed_steps(problems, rng, 4), elementary_facts(rng, 4)):
            assert re.fullmatch(r"(?:(?:\d+ [a-z ]+: |= )?[-+*/=()\d ]*(?: mod )?[-+*/=()\d ]*\n?)+", text), text


def test_reading_exercises_copy_items_and_solve_nothing(rng: random.Random, problems: list[Problem]) -> None:
    solved_by_chance = 0
    num_applied = 0
    for problem in problems * 3:
        question, steps = problem.prompt.strip(), worked_steps(problem)
        text = reading_exercise(problem, rng)
        assert text.startswith(question + "\n")
        lines = text.removeprefix(question + "\n").split("\n")
        applied = [match for line in lines if (match := EQUATION.fullmatch(line))]
        if applied:
            assert len(applied) == len(lines)
            assert len({(match[2], match[3]) for match in applied}) == 1  # one fixed operation on every item
            assert all(is_true(line) for line in lines)
            num_applied += 1
        items = [match[1] for match in applied] or lines
        assert items
        assert all(item in problem.prompt or item.replace("-", "- ") in problem.prompt for item in items), text
        assert "boxed" not in text
        assert "<think>" not in text
        assert not set(steps) <= set(lines), text
        solved_by_chance += bool(set(steps) & set(lines))
    assert num_applied > len(problems) / 2
    # `a * 7 = ...` may be a step of the very question where 7 happens to be its other factor: a line, and rarely.
    assert solved_by_chance / (3 * len(problems)) < 0.05


def test_items_are_the_questions_operands(rng: random.Random, problems: list[Problem]) -> None:
    for problem in problems:
        if problem.source not in ("chain_sum", "products", "lcm", "simple_geometry"):
            continue
        exercise = reading_exercise(problem, rng).removeprefix(problem.prompt.strip() + "\n").split("\n")
        items = [int(re.match(r"-?\d+", line)[0]) for line in exercise]
        metadata = problem.metadata["entry"]["metadata"]
        match problem.source:
            case "chain_sum":
                assert sum(items) == int(problem.answer), problem
            case "products":
                assert items[0] * items[1] == int(problem.answer), problem
            case "lcm":
                assert items == metadata["numbers"]
            case _:
                assert items[-len(metadata["known_angles"]) :] == [int(angle) for angle in metadata["known_angles"]]
