"""The sets of programming questions that `graders.py` grades: HumanEval and MBPP, canonical and spoiled solutions.

A spoiled solution is the canonical one with its function wrapped so that what comes out is put into a list: a grader
that accepts any of those does not look at results.
"""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.benchmarks import BenchmarkSplit
from distill.problems.benchmark import read_benchmark
from distill.protocols import Verifier
from distill.records import Problem

CODE_SETS: dict[str, tuple[BenchmarkSplit, ...]] = {"humaneval": ("test",), "mbpp": ("test", "train")}
WRAPPED = "\n_inner = {name}\ndef {name}(*args, **kwargs):\n    return [_inner(*args, **kwargs)]\n"


def code_rows(verifier: Verifier, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, splits in CODE_SETS.items():
        problems = [problem for split in splits for problem in read_benchmark(name, split, folder)]
        rows.append(_row(verifier, name, "canonical solutions", problems, [p.answer or "" for p in problems]))
        rows.append(_row(verifier, name, "spoiled solutions", problems, [spoiled(p) for p in problems]))
    return rows


def spoiled(problem: Problem) -> str:
    """The canonical solution, but every function that the tests call returns its result in a list."""
    program = problem.answer or ""
    called = problem.metadata["remote"] or [problem.metadata["entry_point"]]
    functions = {node.name for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)}
    return program + "".join(WRAPPED.format(name=name) for name in called if name in functions)


def _row(
    verifier: Verifier, name: str, what: str, problems: Sequence[Problem], programs: Sequence[str]
) -> dict[str, Any]:
    answers = [
        (problem, f"<think>\n</think>\n\n```python\n{program}\n```\n", "stop")
        for problem, program in zip(problems, programs, strict=True)
    ]
    started = time.perf_counter()
    verdicts = list(verifier.verify(answers))
    seconds = time.perf_counter() - started
    listed: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for number, (problem, verdict) in enumerate(zip(problems, verdicts, strict=True)):
        listed[verdict.correct].append(
            {
                "question": problem.prompt[:80],
                "reference": f"number {number}",
                "extracted": (verdict.extracted or "")[:80],
                "state": verdict.state,
                "why": verdict.detail,
            }
        )
    accepted = len(listed[True])
    rarer = accepted < len(listed[False])
    return {
        "set": name,
        "what": what,
        "count": len(problems),
        "accepted": accepted,
        "share": accepted / len(problems),
        "seconds": seconds,
        "programs_per_s": len(problems) / seconds,
        "load_average": os.getloadavg()[0],
        "acceptances" if rarer else "rejections": listed[rarer],
    }
