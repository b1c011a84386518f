"""Rows of multiple choice and of programs in the form in which they are published, read and graded."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError
from distill.problems.benchmark import read_benchmark
from distill.recipe import ContestDates, VerifyConfig
from distill.records import Problem
from distill.verify import open_verifier
from eval.tasks.processors import between_dates

BENCH_DATA = os.environ.get("POTSTILL_BENCH_DATA")
needs_data = pytest.mark.skipif(not BENCH_DATA, reason="POTSTILL_BENCH_DATA is not set")


def read(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> list[Problem]:
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return read_benchmark(name.removesuffix("_test"), "test", folder)


def states(answers: Sequence[tuple[Problem, str]]) -> list[str]:
    with open_verifier(VerifyConfig(num_workers=2)) as verifier:
        asked = [(problem, text, "stop") for problem, text in answers]
        return [verdict.state for verdict in verifier.verify(asked)]  # type: ignore[arg-type]


def program(source: str) -> str:
    return f"```python\n{source}\n```"


def test_gpqa_is_shuffled_once_and_for_ever(tmp_path: Path) -> None:
    rows = [
        {"Question": f"Why {n}?", "Correct Answer": " right ", "High-level domain": "Physics", "Explanation": "long"}
        | {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
        for n in range(40)
    ]
    problems = read(tmp_path, "gpqa_diamond", rows)
    letters = [problem.answer for problem in problems]
    assert set(letters) == set("ABCD"), "the right answer stands first in every row, and in no place of the question"
    for problem in problems:
        assert f"\n{problem.answer}. right" in problem.prompt
        assert "long" not in problem.prompt
    assert problems[0].metadata["family"] == "Physics"
    backwards = {problem.id for problem in read(tmp_path, "gpqa_diamond", rows[::-1])}
    assert backwards == {problem.id for problem in problems}, "the order of a question's choices is its own"
    assert states([(problems[0], f"\\boxed{{{problems[0].answer}}}"), (problems[0], "\\boxed{wrong 2}")]) == [
        "correct",
        "wrong",
    ]


def test_choices_with_ten_options_and_with_labels(tmp_path: Path) -> None:
    options = [f"option {n}" for n in range(10)]
    row = {"question": "Which?", "options": options, "answer": "J", "answer_index": 9, "category": "law"}
    (ten,) = read(tmp_path, "mmlu_pro", [row])
    assert (ten.answer, ten.metadata["family"]) == ("J", "law")
    assert ten.prompt.endswith("\nJ. option 9")
    choices = {"text": ["air", "water", "fire", "earth"], "label": ["1", "2", "3", "4"]}
    (numbered,) = read(tmp_path, "arc_challenge_test", [{"question": "?", "choices": choices, "answerKey": "3"}])
    assert numbered.answer == "C"
    assert states([(ten, "\\boxed{J}"), (ten, "\\boxed{(A)}"), (numbered, "\\boxed{fire}")]) == [
        "correct",
        "wrong",
        "correct",
    ]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("gpqa_diamond", {"Question": "q"}, r"gpqa_diamond\.jsonl:1: Correct Answer: missing"),
        ("mmlu_pro", {"question": "q", "answer": "K", "options": ["a", "b"], "category": "c"}, "'K' is none of the 2"),
        ("mbpp", {"text": "q", "task_id": "x"}, r"mbpp\.jsonl:1: does not say which split it is of"),
        ("humaneval_plus", {"prompt": "q"}, r"humaneval_plus\.jsonl:1: canonical_solution: missing"),
        ("livecodebench", {"public_test_cases": "[1]"}, r"livecodebench\.jsonl:1: not a question .*no list of inputs"),
    ],
)
def test_rows_that_are_no_question_are_named(tmp_path: Path, name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, name, [row])


@needs_data
def test_reference_programs_pass_and_others_do_not() -> None:
    """Real rows; MBPP's file holds several splits."""
    folder = Path(str(BENCH_DATA))
    humaneval, mbpp = (read_benchmark(name, "test", folder) for name in ("humaneval", "mbpp"))
    assert (len(humaneval), len(mbpp), len(read_benchmark("mbpp", "train", folder))) == (164, 500, 374)
    assert 'assert remove_Occ("hello","l") == "heo"' in mbpp[0].prompt
    some = [*humaneval[:3], *mbpp[:3]]
    right = [(problem, program(problem.answer or "")) for problem in some]
    wrong = [(one, program(f"def {name}(*args): return None")) for one, name in ((some[0], "has_close_elements"),)]
    assert states([*right, *wrong]) == ["correct"] * 6 + ["wrong"]


PLUS_TESTS = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        np.testing.assert_allclose(out, exp, atol=atol)
    else:
        assert exact_match
"""


def test_evalplus_compares_numbers_as_numpy_would(tmp_path: Path) -> None:
    check = f"{PLUS_TESTS}\ndef check(candidate):\n    assertion(candidate([1.0, 3.0]), [0.5, 1.5], 0)\n"
    row = {"prompt": "def half(xs):\n    ...\n", "canonical_solution": "    return [x / 2 for x in xs]\n"}
    (half,) = read(tmp_path, "humaneval_plus", [row | {"test": check, "entry_point": "half"}])
    near, far = "[0.5 * x + 1e-9 for x in xs]", "[0.5 * x + 1e-3 for x in xs]"
    row = {"prompt": "Write half.", "code": "def half(xs):\n    return [x / 2 for x in xs]", "test_imports": []}
    test = f"{PLUS_TESTS}\nfor inp, exp in [([[2.0]], [1.0]), ([[3.0]], [1.5])]:\n    assertion(half(*inp), exp, 0)\n"
    (plus,) = read(tmp_path, "mbpp_plus", [row | {"test_list": ["assert half([2.0]) == [1.0]"], "test": test}])
    assert "assert half([2.0]) == [1.0]" in plus.prompt
    assert "3.0" not in plus.prompt
    answers = [(one, program(f"def half(xs):\n    return {of}")) for one in (half, plus) for of in (near, far, "None")]
    assert states(answers) == ["correct", "wrong", "wrong"] * 2


def packed(tests: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


def contest(**changes: Any) -> dict[str, Any]:
    row = {"question_content": "Twice?", "difficulty": "easy", "contest_date": "2024-09-01T00:00:00"}
    row |= {"starter_code": "", "metadata": "{}"}
    row["public_test_cases"] = json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}])
    row["private_test_cases"] = packed(json.dumps([{"input": "5\n", "output": "10\n", "testtype": "stdin"}]))
    return row | changes


def test_livecodebench_has_tests_of_both_kinds(tmp_path: Path) -> None:
    starter = "class Solution:\n    def twice(self, xs: List[int]) -> List[int]:\n        "
    method = contest(
        starter_code=starter,
        metadata=json.dumps({"func_name": "twice"}),
        contest_date="2025-03-01T00:00:00",
        public_test_cases=json.dumps([{"input": "[1, 2]", "output": "[2, 4]", "testtype": "functional"}]),
        private_test_cases=packed(json.dumps([{"input": "[]", "output": "[]", "testtype": "functional"}])),
    )
    stdin, function = read(tmp_path, "livecodebench", [contest(), method])
    assert "def twice(self" in function.prompt
    right = program(f"{starter}return tuple(2 * x for x in xs)")  # `List` is imported for it, a tuple is a list
    answers = [
        (stdin, program("print(2 * int(input()))")),
        (stdin, program("print(4)")),  # right on the public test alone
        (stdin, program("heap: List[int] = [int(input())]\nheappush(heap, 0)\nprint(pow(2, 1, 9) * sum(heap))")),
        (function, right),
        (function, program(f"{starter}return xs")),
    ]
    assert states(answers) == ["correct", "wrong", "correct", "correct", "wrong"]
    window = ContestDates.model_validate({"first": "2024-08-01", "last": "2024-09-01"})
    assert between_dates([stdin, function], window) == [stdin]
    with pytest.raises(DataError, match=r"eval\.contest_dates: none of 1 questions lies between"):
        between_dates([function], window)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_tests_that_name_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"livecodebench\.jsonl:1: not a question .*code, which is not run"):
        read(tmp_path, "livecodebench", [contest(private_test_cases=packed(Harmful()))])
    assert capsys.readouterr().out == ""
