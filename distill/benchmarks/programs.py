"""Benchmarks of programs, graded by their tests in the sandbox (`distill.verify.code`).

HumanEval and MBPP have been read as they are published; field names of the others are those of lm-eval's task files
(0.4.13: HumanEval+, MBPP+) and of LiveCodeBench's own loader, and no file of theirs was at hand.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from distill.benchmarks.benchmark import Benchmark, Row, Table

# EvalPlus compares with numpy, which the sandbox does not have: what its tests ask of it, over lists and numbers.
NUMPY = """
import math, sys, types

def _close(out, exp, rtol, atol):
    if isinstance(exp, (list, tuple)):
        return isinstance(out, (list, tuple)) and len(out) == len(exp) and all(
            _close(one, other, rtol, atol) for one, other in zip(out, exp))
    return out == exp or (abs(out - exp) <= atol + rtol * abs(exp) and not math.isinf(exp))

def _allclose(out, exp, rtol=1e-05, atol=1e-08):
    return _close(out, exp, rtol, atol)

def _assert_allclose(out, exp, rtol=1e-07, atol=0):
    assert _close(out, exp, rtol, atol)

numpy = types.ModuleType("numpy")
numpy.allclose, numpy.inf, numpy.nan = _allclose, math.inf, math.nan
numpy.ndarray, numpy.float32, numpy.float64 = (type(name, (), {}) for name in ("ndarray", "float32", "float64"))
numpy.testing = types.SimpleNamespace(assert_allclose=_assert_allclose)
sys.modules["numpy"] = numpy
"""
# LiveCodeBench's own evaluation runs programs behind these: starter code uses `List` without importing it.
PRELUDE = """
import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from typing import *
from builtins import *
"""
MAX_TESTS_BYTES = 1 << 30  # of one question, unpacked


def _humaneval(row: Row) -> Row:
    return {
        "prompt": row["prompt"],
        "answer": row["canonical_solution"],
        "tests": row["test"],
        "entry_point": row["entry_point"],
    }


def _humaneval_plus(row: Row) -> Row:
    return {**_humaneval(row), "setup": NUMPY}


def _mbpp(row: Row) -> Row:
    """The question shows its three tests, as the paper does (section 2.1): many cannot be guessed without them."""
    tests = "\n".join(row["test_list"])
    return {
        "prompt": f"{row['text']}\n\nYour code should pass these tests:\n\n```python\n{tests}\n```",
        "answer": row["code"],
        "tests": row["test_list"],
        "setup": row.get("test_setup_code") or "",
    }


def _mbpp_plus(row: Row) -> Row:
    """The question shows the first test, as lm-eval's `mbpp_plus_instruct` does."""
    shown = row["test_list"][0]
    return {
        "prompt": f"{row['prompt']}\n\nYour code should satisfy this assertion:\n\n```python\n{shown}\n```",
        "answer": row["code"],
        "tests": row["test"],
        "setup": "\n".join([NUMPY, *row.get("test_imports", ())]),
    }


def _livecodebench(row: Row) -> Row:
    """Tests of both kinds: standard input and output, or a method of `Solution` where the row has starter code."""
    tests = [*_tests(row["public_test_cases"]), *_tests(row["private_test_cases"])]
    starter = str(row.get("starter_code") or "").strip()
    family = {"family": str(row["difficulty"]), "date": str(row["contest_date"])[:10]}
    if not starter:
        how = "The program reads standard input and writes standard output."
        return {
            "prompt": f"{row['question_content'].strip()}\n\n{how}",
            "answer": None,
            "tests": [{"input": test["input"], "output": test["output"]} for test in tests],
            "metadata": {**family, "prelude": PRELUDE},
        }
    name = json.loads(row["metadata"])["func_name"]
    how = f"Use this starter code:\n\n```python\n{starter}\n```"
    return {
        "prompt": f"{row['question_content'].strip()}\n\n{how}",
        "answer": None,
        "tests": _calls(name, tests),
        "metadata": {**family, "prelude": PRELUDE},
    }


def _calls(name: str, tests: Sequence[Row]) -> str:
    """Test code that calls the method with every line of an input as one JSON value; a tuple equals a list."""
    if not name.isidentifier():
        raise ValueError(f"func_name is no name: {name!r}")
    lines = ["def _listed(value):", "    return list(value) if isinstance(value, tuple) else value"]
    for test in tests:
        arguments = ", ".join(repr(json.loads(line)) for line in test["input"].split("\n"))
        lines.append(f"assert _listed(Solution().{name}({arguments})) == {json.loads(test['output'])!r}")
    return "\n".join(lines)


def _tests(text: str) -> list[dict[str, Any]]:
    """A list of tests as JSON, or as JSON that was pickled, compressed and put in base64."""
    try:
        tests = json.loads(text)
    except ValueError:
        unpacked = zlib.decompressobj()
        packed = unpacked.decompress(base64.b64decode(text), MAX_TESTS_BYTES)
        tests = json.loads(_PlainText(io.BytesIO(packed)).load())
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise ValueError("tests are no list of inputs and outputs")
    return tests


class _PlainText(pickle.Unpickler):
    """Reads texts and numbers; a file that names code to be run is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"tests name code, which is not run: {module}.{name}")


def _between(first: int, last: int) -> Callable[[Row], bool]:
    return lambda row: first <= int(row["task_id"]) <= last


PROGRAMS: dict[str, Benchmark] = {
    # Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
    "humaneval": Benchmark(
        repo="openai/openai_humaneval",
        tables={"test": Table("HumanEval.jsonl.gz", "test")},
        fields=_humaneval,
        licence="mit",
        grader="code",
    ),
    # EvalPlus: more tests of the same questions, arXiv 2305.01210.
    "humaneval_plus": Benchmark(
        repo="evalplus/humanevalplus",
        tables={"test": Table("humaneval_plus.jsonl", "test")},
        fields=_humaneval_plus,
        licence="unknown",
        grader="code",
    ),
    # Program Synthesis with Large Language Models, arXiv 2108.07732: one file, whose splits are ranges of `task_id`.
    "mbpp": Benchmark(
        repo="google-research-datasets/mbpp",
        config="full",
        tables={
            "train": Table("mbpp.jsonl", "train", _between(601, 974)),
            "test": Table("mbpp.jsonl", "test", _between(11, 510)),
        },
        fields=_mbpp,
        licence="cc-by-4.0",
        grader="code",
    ),
    "mbpp_plus": Benchmark(
        repo="evalplus/mbppplus",
        tables={"test": Table("mbpp_plus.jsonl", "test")},
        fields=_mbpp_plus,
        licence="unknown",
        grader="code",
    ),
    # arXiv 2403.07974. The authors' own repository is read by code, which is not run: this copy of it has tables.
    "livecodebench": Benchmark(
        repo="lighteval/code_generation_lite",
        config="release_v6",
        tables={"test": Table("livecodebench.jsonl", "test")},
        fields=_livecodebench,
        licence="unknown",
        grader="code",
    ),
}
