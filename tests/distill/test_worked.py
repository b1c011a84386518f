"""Worked solutions: graded by the real verifier, and every line recalculated with an evaluator of this file's own."""

from __future__ import annotations

import ast
import itertools
import re
import secrets
from collections.abc import Iterator
from fractions import Fraction

import pytest

from distill.errors import DataError
from distill.problems.stream import pico_families, stream
from distill.problems.worked import WORKED, worked_solution, worked_steps
from distill.protocols import Verifier
from distill.recipe import VerifyConfig
from distill.records import Problem
from distill.verify import extract_answer, open_verifier
from distill.verify.extract import reasoning_is_complete

PER_FAMILY = 250
FRESH_SEED = secrets.randbelow(2**31)  # another one in every run: a failure shows the problem itself
STEP = re.compile(r"(?:(\d+) ([a-z ]+): )?(-?\d+) (\+|-|\*|/|mod) (-?\d+) = (-?\d+)")


def value(expression: str) -> Fraction:
    """Exact value of `+ - * / mod` over integers and parentheses."""

    def of(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -of(operand)
            case ast.BinOp(left=left, op=operator, right=right):
                a, b = of(left), of(right)
                match operator:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case ast.Div():
                        return a / b
                    case ast.Mod():
                        return a % b
        raise ValueError(ast.dump(node))

    return of(ast.parse(expression.replace(" mod ", " % "), mode="eval").body)


def drawn(family: str, split: str, count: int = PER_FAMILY) -> list[Problem]:
    return list(itertools.islice(stream(family, pico_families()[family], seed=FRESH_SEED, split=split), count))


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Problem]]:
    return {family: drawn(family, "train") + drawn(family, "held_out", PER_FAMILY // 5) for family in pico_families()}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with open_verifier(VerifyConfig(num_workers=2)) as verifier:
        yield verifier


def numbers(text: str) -> set[int]:
    """Absolute values of the integers of a text, decimals with a fraction of zero included."""
    return {int(number) for number in re.findall(r"(?<![\w.])\d+(?=\.0|[^\d.\w]|\.?\s|\.?$|-gon|i\b)", text)}


def test_the_evaluator_of_this_file_can_tell_right_from_wrong() -> None:
    assert value("3 + 4 * ( 2 - 5 )") == -9
    assert value("-7 - -8 * 9") == 65
    assert value("84 mod 36") == 12
    assert value("84 / 36") == Fraction(7, 3)
    with pytest.raises(ValueError, match="Pow"):
        value("2 ** 3")


def test_every_family_of_the_set_has_worked_reasoning() -> None:
    assert set(WORKED) == set(pico_families())


def test_every_worked_solution_is_graded_correct(problems: dict[str, list[Problem]], verifier: Verifier) -> None:
    every = [problem for of_family in problems.values() for problem in of_family]
    verdicts = verifier.verify([(problem, worked_solution(problem), "stop") for problem in every])
    assert [(p, v) for p, v in zip(every, verdicts, strict=True) if v.state != "correct"] == []


def test_a_solution_is_reasoning_then_the_boxed_answer(problems: dict[str, list[Problem]]) -> None:
    for problem in itertools.chain.from_iterable(problems.values()):
        text, lines = worked_solution(problem), worked_steps(problem)
        assert text == "<think>\n" + "\n".join(lines) + "\n</think>\n\n\\boxed{" + str(problem.answer) + "}"
        assert reasoning_is_complete(text)
        assert extract_answer(text) == problem.answer
        assert len(lines) >= 1
        assert not any("\n" in line or line != line.strip() for line in lines)


@pytest.mark.parametrize("family", sorted(set(pico_families()) - {"basic_arithmetic"}))
def test_every_step_is_one_true_equation(problems: dict[str, list[Problem]], family: str) -> None:
    for problem in problems[family]:
        for line in worked_steps(problem):
            step = STEP.fullmatch(line)
            assert step, (problem, line)
            count, animal, left, operator, right, result = step.groups()
            assert value(f"{left} {operator} {right}") == int(result), (problem, line)
            if family == "leg_counting" and count:
                assert f"{count} {animal}" in problem.prompt
                assert count == left


@pytest.mark.parametrize("family", sorted(set(pico_families()) - {"basic_arithmetic"}))
def test_steps_use_what_the_question_or_an_earlier_step_gives(problems: dict[str, list[Problem]], family: str) -> None:
    """The left operand always; a right one may be common knowledge (legs, 180) or a part of a factor (tens, ones)."""
    for problem in problems[family]:
        known = numbers(problem.prompt) | ({0, 1} if family == "complex_arithmetic" else set())
        for line in worked_steps(problem):
            _, _, left, _, right, result = STEP.fullmatch(line).groups()
            assert abs(int(left)) in known, (problem, line)
            known |= {abs(int(right)), abs(int(result))}


@pytest.mark.parametrize("family", ["chain_sum", "products", "lcm", "leg_counting", "simple_geometry"])
def test_the_last_step_gives_the_answer(problems: dict[str, list[Problem]], family: str) -> None:
    for problem in problems[family]:
        assert STEP.fullmatch(worked_steps(problem)[-1])[6] == problem.answer, problem


def test_the_last_two_steps_of_a_fraction_are_its_parts(problems: dict[str, list[Problem]]) -> None:
    for problem in problems["fraction_simplification"]:
        numerator, denominator = (STEP.fullmatch(line)[6] for line in worked_steps(problem)[-2:])
        assert f"{numerator}/{denominator}" == problem.answer, problem


def test_complex_products_end_in_both_parts(problems: dict[str, list[Problem]]) -> None:
    for problem in problems["complex_arithmetic"]:
        results = [int(STEP.fullmatch(line)[6]) for line in worked_steps(problem)]
        answer = complex(problem.answer.replace(" ", "").replace("i", "j"))
        assert complex(results[2], results[5]) == answer, problem


def test_rewritten_expressions_keep_their_value_and_end_in_the_answer(problems: dict[str, list[Problem]]) -> None:
    for problem in problems["basic_arithmetic"]:
        expression = problem.metadata["entry"]["metadata"]["expression"]
        lines = worked_steps(problem)
        assert expression in problem.prompt
        assert all(line.startswith("= ") for line in lines)
        assert {value(line[2:]) for line in lines} == {value(expression)}, problem
        assert lines[-1] == f"= {problem.answer}"
        sizes = [len(re.findall(r"\d+", line)) for line in (expression, *lines)]
        assert sizes == list(range(sizes[0], 0, -1)), (problem, lines)  # one operation a line


def test_a_family_without_worked_reasoning_is_named() -> None:
    problem = drawn("lcm", "train", 1)[0].model_copy(update={"source": "lcn"})
    with pytest.raises(DataError, match=r"no worked reasoning for 'lcn'; did you mean 'lcm'\?"):
        worked_steps(problem)
