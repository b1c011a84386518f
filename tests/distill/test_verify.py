"""Grading: right answers in every spelling, wrong ones, and everything that a model may write to break a grader."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from distill.errors import EnvironmentFault
from distill.problems import load_problems
from distill.problems.stream import PICO_FAMILIES
from distill.problems.worked import worked_solution
from distill.protocols import Verifier
from distill.recipe import ReasoningGymSource, VerifyConfig
from distill.records import Problem
from distill.verify import extract_answer, open_verifier
from distill.verify.extract import reasoning_is_complete
from distill.verify.guards import EVALUATING, is_plain_arithmetic
from distill.verify.pool import WorkerPool
from tests.repository import REPOSITORY

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with open_verifier(VerifyConfig(num_workers=2, timeout_s=TIMEOUT_S)) as verifier:
        yield verifier


def boxed(answer: str) -> str:
    return f"<think>\nso\n</think>\n\nThe answer is \\boxed{{{answer}}}."


def maths(answer: str | None) -> Problem:
    return Problem(prompt="?", answer=answer, grader="math", source="m")


def gym(count: int, families: Any = None, seed: int = 1) -> list[Problem]:
    return load_problems(
        [ReasoningGymSource(families=families or str(PICO_FAMILIES), count=count, seed=seed)], base_dir=Path.cwd()
    )


def state(verifier: Verifier, problem: Problem, answer: str) -> str:
    (verdict,) = verifier.verify([(problem, boxed(answer), "stop")])
    return verdict.state


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\\boxed{1}\n</think>\n\n\\boxed{2}", "2"),
        ("<think>\n\\boxed{1}\n</think>\n\n", None),
        ("<think>\n\\boxed{1}\n", None),
        ("\\boxed{7}", "7"),
        ("\\boxed{\\frac{1}{2}} so \\boxed {x_{1}}", "x_{1}"),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{1} then \\boxed{\\boxed{2}", "2"),
        ("$\\boxed{1}$ and $\\boxed{\\frac{1}{2}}$", "1, \\frac{1}{2}"),
        ("\\boxed{1}, \\boxed{2} or \\boxed{3}", "1, 2 \\text{ or } 3"),
        ("\\boxed{1} and then \\boxed{2}", "2"),
        ("\\boxed{1}\\boxed{2}", "2"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("a</think>\\boxed{1}</think>\\boxed{3}", "3"),
        ("{ \\boxed{4} ", "4"),
        ("} \\boxed{4}", "4"),
        ("no answer", None),
        ("", None),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_balanced_box_after_the_reasoning(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab{}\\boxed1", max_size=60), st.text(alphabet="ab12 +", max_size=10))
def test_a_box_at_the_end_is_found_behind_anything_that_is_no_box(noise: str, answer: str) -> None:
    noise = noise.replace("\\", "")
    assert extract_answer(f"{noise}\n\\boxed{{{answer}}}") == answer.strip()


def test_extraction_is_linear_in_hostile_text() -> None:
    started = time.process_time()
    assert extract_answer("\\boxed{" * 300_000) is None
    assert extract_answer("\\boxed{" * 100_000 + "1" + "}" * 100_000) == "1"
    assert time.process_time() - started < 5


def test_complete_reasoning() -> None:
    assert reasoning_is_complete(boxed("1"))
    for text in (
        "\\boxed{1}",
        "<think>\nx",
        boxed("1")[1:],
        boxed("1") + "<think>",
        "x" + boxed("1"),
        "<think></think>",
    ):
        assert not reasoning_is_complete(text)


# --- verdicts ---------------------------------------------------------------------------------------------------------

EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{3}{4}", "\\dfrac34"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("1000", "1,000"),
    ("x^2-1", "(x-1)(x+1)"),
    ("(1,2]", "(1, 2]"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("90", "90^\\circ"),
    ("5", "x = 5"),
    ("-\\frac{2}{3}", "\\frac{-2}{3}"),
    ("\\text{east}", "\\text{ east }"),
    ("3/4", "\\frac{3}{4}"),
    ("8\\pi", "8 \\pi"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]
UNEQUAL = [
    ("\\frac{1}{2}", "0.51"),
    ("(1,2)", "(2,1)"),
    ("5", "-5"),
    ("x^2", "x^3"),
    ("12", "1 or 12 or 13"),
    ("7", ""),
]


def test_equal_mathematics_is_correct_and_unequal_is_wrong(verifier: Verifier) -> None:
    for pairs, expected in ((EQUAL, "correct"), (UNEQUAL, "wrong")):
        verdicts = verifier.verify([(maths(gold), boxed(given), "stop") for gold, given in pairs])
        assert [(*pair, verdict.state) for pair, verdict in zip(pairs, verdicts, strict=True)] == [
            (*pair, expected) for pair in pairs
        ]


def test_verdicts_that_need_no_grader(verifier: Verifier) -> None:
    cut = "<think>\nand then"
    verdicts = list(
        verifier.verify(
            [
                (maths("1"), cut, "length"),
                (maths("1"), cut, "stop"),
                (maths("1"), boxed("1"), "length"),
                (maths(None), boxed("1"), "stop"),
                (maths("???"), boxed("blue"), "stop"),
                (maths("1"), boxed("1" * 200_000), "stop"),
            ]
        )
    )
    assert [v.state for v in verdicts] == ["truncated", "wrong", "correct", "unverifiable", "unverifiable", "wrong"]
    assert verdicts[2].extracted == "1"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "correct"),
        ("(b)", "correct"),
        ("\\text{B}", "correct"),
        ("two", "correct"),
        ("B. two", "correct"),
        ("A", "wrong"),
        ("B. one", "wrong"),
        ("B or C", "wrong"),
        ("E", "wrong"),
        ("", "wrong"),
    ],
)
def test_choices(verifier: Verifier, answer: str, expected: str) -> None:
    choices = {"choices": ["one", "two", "a third", "4"]}
    problem = Problem(prompt="?", answer="B", grader="choice", source="c", metadata=choices)
    assert state(verifier, problem, answer) == expected


def test_worked_solutions_of_the_pico_set_are_correct_and_altered_ones_wrong(verifier: Verifier) -> None:
    problems = gym(160)
    right = list(verifier.verify([(p, worked_solution(p), "stop") for p in problems]))
    assert {v.state for v in right} == {"correct"}
    altered = [boxed(re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), p.answer or "")) for p in problems]
    assert {v.state for v in verifier.verify([(p, t, "stop") for p, t in zip(problems, altered, strict=True)])} == {
        "wrong"
    }


def test_verdicts_survive_storage_of_the_problem(verifier: Verifier) -> None:
    problems = gym(40, {"polynomial_equations": {}, "simple_equations": {}, "tower_of_hanoi": {}, "countdown": {}})
    stored = [Problem.model_validate_json(p.model_dump_json()) for p in problems]
    both = [
        [v.state for v in verifier.verify([(p, boxed(p.answer or ""), "stop") for p in ps])]
        for ps in (problems, stored)
    ]
    assert both[0] == both[1] == ["correct"] * 40


def test_a_problem_that_cannot_be_graded_is_our_failure(verifier: Verifier) -> None:
    lost = Problem(
        prompt="?", answer="1", grader="reasoning_gym", source="x", metadata={"dataset": "no_such", "entry": {}}
    )
    assert state(verifier, lost, "1") == "infra_error"


@pytest.mark.timeout(120)
def test_five_thousand_answers_take_seconds(verifier: Verifier) -> None:
    problems = gym(1_000)
    batch = [(p, boxed(p.answer or ""), "stop") for p in problems] * 5
    list(verifier.verify(batch[:10]))
    started = time.monotonic()
    assert {v.state for v in verifier.verify(batch)} == {"correct"}  # type: ignore[arg-type]
    assert time.monotonic() - started < 60  # two on an idle machine


# --- guards -----------------------------------------------------------------------------------------------------------


def test_every_scorer_that_evaluates_is_guarded() -> None:
    """Nothing in reasoning-gym evaluates a scorer's `answer` outside of the modules that are guarded."""
    import reasoning_gym

    evaluating = set()
    for module in pkgutil.walk_packages(reasoning_gym.__path__, "reasoning_gym."):
        spec = importlib.util.find_spec(module.name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        source = Path(spec.origin).read_text(encoding="utf-8")
        if re.search(r"\b(eval|exec|compile|loads)\((user_|predicted_)?(answer|solution)\b", source):
            if not re.search(r"\b(eval|exec)\(\w*answer", source):
                continue  # json.loads
            evaluating.add(module.name)
    assert evaluating <= set(EVALUATING)
    assert evaluating


@pytest.mark.parametrize("text", ["3*x**2 + sin(x)/2", "(8 - 2) * 4", "x^2 - 1.5", "exp(-x)*log(x) + C", "5!"])
def test_plain_arithmetic_passes(text: str) -> None:
    assert is_plain_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    ["x.__class__", "().a", "foo(1)", "x.y", "[1]", "'a'", "__import__", "x=1", "1 .real", "lambda: 1", "S(1).n"],
)
def test_what_python_is_made_of_does_not(text: str) -> None:
    assert not is_plain_arithmetic(text)


# --- the pool ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_one_hanging_answer_costs_its_own_verdict_alone() -> None:
    problems = gym(60)
    batch = [(p, boxed(p.answer or ""), "stop") for p in problems]
    for place in (7, 30):
        batch.insert(place, (maths("3"), boxed("(10^8)!"), "stop"))
    with open_verifier(VerifyConfig(num_workers=2, timeout_s=1.0)) as verifier:
        states = [v.state for v in verifier.verify(batch)]  # type: ignore[arg-type]
    assert [index for index, s in enumerate(states) if s != "correct"] == [7, 30]
    assert states[7] in ("timeout", "wrong")


@pytest.mark.timeout(120)
def test_a_killed_worker_is_replaced_and_nothing_is_lost() -> None:
    tasks = [
        {"grader": "math", "reference": "4", "answer": "2+2" if n % 2 else "5", "metadata": {}} for n in range(2_000)
    ]
    pool = WorkerPool(num_workers=2, timeout_s=10, memory_bytes=1 << 30)
    results, kills = [], 0
    for result in pool.run(tasks):
        results.append(result[0])
        if len(results) in (100, 700, 1_300):
            os.kill(pool.pids[0], signal.SIGKILL)
            kills += 1
    assert kills == 3
    assert results == ["wrong", "correct"] * 1_000
    started = pool.pids
    pool.close()
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.timeout(120)
def test_an_answer_at_which_workers_die_twice_is_our_failure() -> None:
    tasks = [{"grader": "math", "reference": "4", "answer": "2+2", "metadata": {}} for _ in range(8)]
    tasks[3] = {"grader": "math", "reference": "4", "metadata": {}}  # has no answer: its worker dies of a KeyError
    pool = WorkerPool(num_workers=1, timeout_s=10, memory_bytes=1 << 30)
    results = list(pool.run(tasks))
    pool.close()
    assert [state for state, _ in results] == ["correct"] * 3 + ["infra_error"] + ["correct"] * 4
    assert "KeyError" in results[3][1]


@pytest.mark.parametrize(("module", "starts"), [("pydantic", False), ("sympy", True)])
def test_a_broken_installation_is_never_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, starts: bool
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = WorkerPool(num_workers=1, timeout_s=10, memory_bytes=1 << 30)
    task = {"grader": "math", "reference": "4", "answer": "4.0", "metadata": {}}
    if starts:
        assert list(pool.run([task])) == [("infra_error", "ImportError: broken here")]
    else:
        with pytest.raises(EnvironmentFault, match=r"workers do not start .*broken here"):
            list(pool.run([task]))
    pool.close()


ORPHAN = """
    import sys
    from distill.verify.pool import WorkerPool
    pool = WorkerPool(num_workers=1, timeout_s=0.5, memory_bytes=1 << 30)
    task = {"grader": "math", "reference": "4", "answer": "4.0", "metadata": {}}
    hang = {**task, "answer": "(10^8)!"}
    results = pool.run([task, hang])
    next(results)
    print(pool.pids[0], flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(120)
def test_workers_end_with_their_parent_even_if_they_hang() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ORPHAN)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 15
    while _alive(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_abandoning_a_run_leaves_the_next_one_right(verifier: Verifier) -> None:
    many = [(maths(str(n)), boxed(f"{n}.0"), "stop") for n in range(300)]
    stream = verifier.verify(many)  # type: ignore[arg-type]
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [state(verifier, maths("3"), answer) for answer in ("4", "3.0")] == ["wrong", "correct"]
