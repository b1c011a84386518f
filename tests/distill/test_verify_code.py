"""Grading programs: extraction, both kinds of tests, what is unverifiable, whose failure a failure is."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.code_sets import spoiled
from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.problems import load_problems
from distill.problems.benchmark import read_benchmark
from distill.protocols import Verifier
from distill.recipe import CodeLimits, LocalSource, VerifyConfig, parse
from distill.records import Problem
from distill.sandbox import LEVELS, Level, Sandbox, SandboxedProgram, SandboxFailure, open_sandbox
from distill.verify import open_verifier
from distill.verify.code import grader as code_grader
from distill.verify.code.wire import decode, encode
from distill.verify.extract import extract_program, reasoning_is_complete

BENCH_DATA = os.environ.get("POTSTILL_BENCH_DATA")


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    try:
        open_sandbox()
    except EnvironmentFault as exc:
        pytest.skip(str(exc))
    with open_verifier(VerifyConfig(num_workers=2, code=CodeLimits(timeout_s=60.0))) as verifier:
        yield verifier


def answer(program: str, language: str = "python") -> str:
    return f"<think>\nso\n</think>\n\nHere it is:\n\n```{language}\n{program}\n```\n"


def code(**metadata: Any) -> Problem:
    return Problem(prompt="?", answer=None, grader="code", source="c", metadata=metadata)


def check(*lines: str, **metadata: Any) -> Problem:
    body = "".join(f"    {line}\n" for line in lines)
    return code(tests=f"def check(candidate):\n{body}", entry_point="f", **metadata)


def verdicts(verifier: Verifier, problem: Problem, *programs: str) -> list[tuple[str, str]]:
    answers = [(problem, answer(program), "stop") for program in programs]
    return [(verdict.state, verdict.detail) for verdict in verifier.verify(answers)]  # type: ignore[arg-type]


def states(verifier: Verifier, problem: Problem, *programs: str) -> list[str]:
    return [state for state, _ in verdicts(verifier, problem, *programs)]


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (answer("x = 1"), "x = 1\n"),
        (answer("x = 1", "py"), "x = 1\n"),
        (answer("x = 1", "Python3"), "x = 1\n"),
        (answer("x = 1", ""), "x = 1\n"),
        (answer("x = 1") + answer("y = 2")[8:], "y = 2\n"),
        (answer("x = 1") + "```\nthe output\n```\n", "x = 1\n"),
        (answer("x = 1") + "```bash\nls\n```\n", "x = 1\n"),
        ("<think>\n```python\nx = 1\n```\n</think>\n\nno program", None),
        ("<think>\n```python\nx = 1\n```\n", None),
        ("```python\nx = 1\n", None),
        ("````python\ns = '''\n```\n'''\n````\n", "s = '''\n```\n'''\n"),
        ("~~~python\nx = 1\n~~~\n", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```\n", "  x = 1\n"),
        ("```js\nx\n```", None),
        ("", None),
    ],
)
def test_the_last_python_block_after_the_reasoning(text: str, program: str | None) -> None:
    assert extract_program(text) == program


def test_complete_reasoning_of_a_program() -> None:
    assert reasoning_is_complete(answer("x = 1"), "code")
    assert not reasoning_is_complete(answer("x = 1"))
    assert not reasoning_is_complete("<think>\n</think>\n\n\\boxed{1}", "code")


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_right_and_wrong_functions(verifier: Verifier) -> None:
    problem = check("assert candidate([1, 2], k=3) == [4, 5]", "assert candidate([], 1) == []")
    programs = {
        "def f(a, k): return [x + k for x in a]": "correct",
        "def f(a, k): return [x - k for x in a]": "wrong",
        "def f(a, k): return tuple(x + k for x in a)": "wrong",
        "def f(a, k): raise ValueError(k)": "wrong",
        "def f(a): return a": "wrong",
        "def g(a, k): return a": "wrong",
        "def f(a, k: return a": "wrong",
        "import numpy\ndef f(a, k): return [x + k for x in a]": "wrong",
        "def f(a, k):\n    print('seen')\n    return [x + k for x in a]\nif __name__ == '__main__': 1 / 0": "correct",
    }
    assert dict(zip(programs, states(verifier, problem, *programs), strict=True)) == programs


def test_details_say_what_was_wrong(verifier: Verifier) -> None:
    problem = check("assert candidate(1) == 2")
    found = [
        detail for _, detail in verdicts(verifier, problem, "def f(x): return 1", "def f(x): return x[0]", "1 / 0")
    ]
    assert found[0] == "fails: assert candidate(1) == 2"
    assert found[1].startswith("TypeError: 'int' object is not subscriptable")
    assert found[2] == "ZeroDivisionError: division by zero"


def test_tests_that_loop_draw_and_allow_tolerances(verifier: Verifier) -> None:
    problem = check(
        "import math, random",
        "for _ in range(20):",
        "    x = random.uniform(1, 100)",
        "    assert abs(candidate(x) - math.sqrt(x)) < 1e-6",
        "assert math.isclose(candidate(2), 2 ** 0.5)",
    )
    right, coarse = "def f(x): return x ** 0.5 + 1e-9", "def f(x): return round(x ** 0.5, 2)"
    assert states(verifier, problem, right, coarse, "def f(x): return float('nan')") == ["correct", "wrong", "wrong"]


def test_helpers_of_the_tests_are_not_the_programs_own(verifier: Verifier) -> None:
    """A program that redefines the helper which the tests check it with gains nothing."""
    setup = "def encode(s): return s[::-1]\n"
    problem = check("for s in ('abc', 'x'):", "    assert candidate(encode(s)) == s", setup=setup, prelude=setup)
    cheat = "def encode(s): return s\ndef f(s): return s"
    assert states(verifier, problem, "def f(s): return encode(s)", cheat) == ["correct", "wrong"]


def test_objects_of_the_programs_own_stay_there(verifier: Verifier) -> None:
    tests = (
        "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\nassert depth(root) == 3\nassert root.value == 1"
    )
    node = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    right = f"{node}def depth(n): return 1 + depth(n.left) if n else 0"
    cheat = f"{node}    def __eq__(self, other): return True\ndef depth(n): return n"
    assert states(verifier, code(tests=tests, remote=["Node", "depth"]), right, cheat) == ["correct", "wrong"]
    both = code(tests="assert make(1) == make(1)", remote=["make"])
    assert states(verifier, both, f"{node}make = Node") == ["unverifiable"]


def test_what_cannot_be_verified_is_said_to_be(verifier: Verifier) -> None:
    right = "def f(x): return 1"
    for problem, reason in (
        (code(), "no tests"),
        (check("assert True"), "ask nothing"),
        (check("assert candidate(lambda: 1) == 1"), "type function cannot be sent"),
        (code(tests="def check(candidate:\n", entry_point="f"), "SyntaxError"),
        (code(tests="import no_such_module\n", entry_point="f"), "No module named"),
        (code(tests="assert 1 == 1", entry_point="f"), "'check'"),
        (check("assert candidate(1) == undefined_name"), "undefined_name"),
    ):
        ((state, detail),) = verdicts(verifier, problem, right)
        assert state == "unverifiable"
        assert reason in detail
    with open_verifier(VerifyConfig(num_workers=1, code=CodeLimits(timeout_s=0.5))) as quick:
        assert states(quick, check("while True: pass"), right) == ["unverifiable"]


def test_standard_input_and_output(verifier: Verifier) -> None:
    cases = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]
    problem = code(cases=cases)
    programs = {
        "print(sum(map(int, input().split())))": "correct",
        "import sys\nsys.stdout.write(f'{sum(map(int, sys.stdin.read().split()))} \\n\\n')": "correct",
        "print(3)": "wrong",
        "print(sum(map(int, input().split())))\nraise SystemExit(1)": "wrong",
        "print(sum(map(int, input().split())))\ninput()": "wrong",
    }
    found = verdicts(verifier, problem, *programs)
    assert dict(zip(programs, (state for state, _ in found), strict=True)) == programs
    assert found[2][1] == "test 2 of 2: other output than expected"


def test_no_program_and_a_cut_one(verifier: Verifier) -> None:
    problem = check("assert candidate(1) == 1")
    cut = "<think>\n</think>\n\n```python\ndef f(x):\n"
    found = verifier.verify([(problem, cut, "length"), (problem, cut, "stop"), (problem, "x" * 500_000, "stop")])
    assert [verdict.state for verdict in found] == ["truncated", "wrong", "wrong"]
    assert states(verifier, problem, "x = 1\n" * 100_000) == ["wrong"]


def test_closing_ends_what_is_being_graded() -> None:
    try:
        open_sandbox()
    except EnvironmentFault as exc:
        pytest.skip(str(exc))
    grader = code_grader.CodeGrader(CodeLimits(timeout_s=10_000.0), num_workers=1)
    future = grader.submit({"cases": [{"input": "", "output": ""}] * 100}, "import time\ntime.sleep(100000)")
    while not future.running():
        time.sleep(0.01)
    grader.close()
    assert future.result()[0] == "infra_error"


def test_a_failing_sandbox_is_never_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once more; what fails twice is an infra_error."""
    try:
        sandbox = open_sandbox()
    except EnvironmentFault as exc:
        pytest.skip(str(exc))
    failures = iter([True, False, True, True])
    start = code_grader._start

    def failing(*arguments: Any) -> Any:
        if arguments[1] is code_grader.callee and next(failures):
            raise SandboxFailure("no more processes", where="sandbox")
        return start(*arguments)

    monkeypatch.setattr(code_grader, "_start", failing)
    grader = code_grader.CodeGrader(CodeLimits(timeout_s=60.0), num_workers=1, sandbox=sandbox)
    task = ({"tests": "def check(candidate): assert candidate(1) == 1", "entry_point": "f"}, "def f(x): return x")
    assert list(grader.run([task, task])) == [("correct", ""), ("infra_error", "sandbox: no more processes")]
    grader.close()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.slow
def test_programs_that_are_killed_from_outside_are_graded_again(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers, of each of which the first try has its program or its tests killed: none is wrong."""

    class Struck(Sandbox):
        strike: int | None = None  # which of the sandboxes that are started next

        def start(self, *arguments: Any) -> SandboxedProgram:
            program = super().start(*arguments)
            if self.strike == 0:
                signal.pidfd_send_signal(program._pidfd, signal.SIGKILL)
            self.strike = None if self.strike is None else self.strike - 1
            return program

    try:
        struck = Struck(open_sandbox(level)._cage, {})
    except EnvironmentFault as exc:
        pytest.skip(str(exc))
    grade_program, tries = code_grader.grade_program, Counter[int]()

    def grade(sandbox: Sandbox, metadata: Any, *rest: Any) -> Any:
        struck.strike = metadata["number"] % 2 if tries[metadata["number"]] == 0 else None
        tries[metadata["number"]] += 1
        return grade_program(sandbox, metadata, *rest)

    monkeypatch.setattr(code_grader, "grade_program", grade)
    grader = code_grader.CodeGrader(CodeLimits(timeout_s=60.0), num_workers=1, sandbox=struck)
    problem = {"tests": "def check(candidate): assert candidate(1) == 1", "entry_point": "f"}
    tasks = [(problem | {"number": number}, "def f(x): return x") for number in range(20)]
    assert list(grader.run(tasks)) == [("correct", "")] * len(tasks)
    assert sum(tries.values()) > 1.5 * len(tasks)
    grader.close()


def test_without_a_sandbox_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise EnvironmentFault("no sandbox here", where="sandbox")

    monkeypatch.setattr(code_grader, "open_sandbox", refuse)
    with open_verifier(VerifyConfig()) as verifier:
        assert verifier is not None
        with pytest.raises(EnvironmentFault, match="no sandbox here"):
            list(verifier.verify([(check("assert candidate(1) == 1"), answer("def f(x): return x"), "stop")]))


# --- the wire ---------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**70)
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=20)
    | st.complex_numbers()
    | st.fractions()
    | st.decimals(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def refuse(value: Any) -> Any:
    raise AssertionError(f"{value!r} is plain data")


@settings(max_examples=100, deadline=None)
@given(plain)
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    arrived = decode(encode(value, refuse), refuse)
    assert repr(arrived) == repr(value)
    assert type(arrived) is type(value)


def test_subclasses_arrive_as_what_they_are_underneath() -> None:
    class Liar:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    for base, value in ((int, 7), (str, "a"), (list, [1]), (dict, {1: 2}), (float, 0.5), (tuple, (1,)), (set, {1})):
        lying = type("L", (Liar, base), {"__iter__": lambda self: iter("no"), "__repr__": lambda self: "no"})(value)
        arrived = decode(encode(lying, refuse), refuse)
        assert type(arrived) is base
        assert arrived == value
        assert arrived != object()


def test_other_values_that_programs_return() -> None:
    for value in (
        range(1, 9, 2),
        bytearray(b"x"),
        frozenset({1}),
        Fraction(1, 3),
        Decimal("0.10"),
        int,
        -0.0,
        math.inf,
    ):
        assert repr(decode(encode(value, refuse), refuse)) == repr(value)
    assert list(decode(encode(map(str, [1, 2]), refuse), refuse)) == ["1", "2"]
    assert list(decode(encode({1: 2}.items(), refuse), refuse)) == [(1, 2)]
    assert encode([object(), " \n"], lambda value: "7:object") == b"l2 h7:object s\\x20\\n"


FORGED = (
    "",
    "l2 i1",
    "l1 i1 i2",
    "x",
    "izz",
    "yprint",
    "d1 i1",
    "e1 l0",
    "sé",
    "s\\x",
    "F1/0",
    "q",
    "Dx",
    "{}",
    "[[",
)


@pytest.mark.parametrize("forged", FORGED)
def test_forged_values_are_refused(forged: str) -> None:
    with pytest.raises(ValueError):
        decode(forged.encode(), refuse)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_the_question_shows_signatures_and_no_expected_value(tmp_path: Path) -> None:
    row = {
        "text": "Count.",
        "code": "class Node:\n    def __init__(self, v): pass\ndef count(n, deep=False): return 1\ndef other(): pass",
        "test_list": ["assert count(Node(1)) == 123456"],
        "test_setup_code": "",
    }
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    columns = {
        "prompt_field": "text",
        "answer_field": "code",
        "tests_field": "test_list",
        "setup_field": "test_setup_code",
    }
    (problem,) = load_problems([LocalSource(path="x.jsonl.gz", grader="code", **columns)], base_dir=tmp_path)
    assert "def count(n, deep=False):" in problem.prompt
    assert "class Node:\n    def __init__(self, v):" in problem.prompt
    assert "other" not in problem.prompt
    assert "123456" not in problem.prompt
    assert problem.source == "x"
    assert problem.metadata["remote"] == ["Node", "count"]


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["1\n"], "outputs": ["2\n"]},
        [{"input": "1\n", "output": "2\n", "testtype": "stdin"}],
        json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]}),
    ],
)
def test_inputs_and_outputs_are_read_in_their_usual_shapes(tmp_path: Path, tests: Any) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Add one.", "answer": None, "tests": tests}) + "\n")
    source = LocalSource(path="x.jsonl", grader="code", tests_field="tests")
    (problem,) = load_problems([source], base_dir=tmp_path)
    assert problem.metadata == {"cases": [{"input": "1\n", "output": "2\n"}]}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"tests": 7}, "tests"),
        ({"tests": []}, "tests"),
        ({}, "tests"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "tests"),
        ({"tests": "assert f(1) =="}, "tests"),
        ({"tests": "def check(candidate): pass", "entry": "not a name"}, "entry"),
    ],
)
def test_rows_without_sound_tests_name_line_and_field(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "?", "answer": None} | row) + "\n")
    entry = "entry" if "entry" in row else None
    source = LocalSource(path="x.jsonl", grader="code", tests_field="tests", entry_point_field=entry)
    with pytest.raises(DataError, match=rf"x\.jsonl:1: {field}: "):
        load_problems([source], base_dir=tmp_path)


def test_tests_and_the_code_grader_go_together() -> None:
    for fields in ({"grader": "code"}, {"grader": "math", "tests_field": "tests"}):
        with pytest.raises(RecipeError, match="tests_field"):
            parse(LocalSource, {"path": "x.jsonl"} | fields, where="recipe")


@pytest.mark.skipif(BENCH_DATA is None, reason="POTSTILL_BENCH_DATA is not set")
@pytest.mark.parametrize(("name", "step"), [("humaneval", 5), ("mbpp", 30)])
def test_canonical_solutions_are_correct_and_spoiled_ones_are_not(verifier: Verifier, name: str, step: int) -> None:
    """A sample of what `benchmarks/graders.py` runs whole."""
    problems = read_benchmark(name, "test", Path(str(BENCH_DATA)))[::step]
    solved = [(problem, answer(problem.answer or ""), "stop") for problem in problems]
    assert Counter(verdict.state for verdict in verifier.verify(solved)) == {"correct": len(problems)}  # type: ignore[arg-type]
    broken = [(problem, answer(spoiled(problem)), "stop") for problem in problems[:8]]
    assert Counter(verdict.state for verdict in verifier.verify(broken)) == {"wrong": len(broken)}  # type: ignore[arg-type]
