"""Functions of the task files: questions as lm-eval documents, and the verdicts of a document's samples as metrics.

A response that went through `eval.adapter.PotstillLM` carries its verdict already (graded in bulk by `distill.verify`).
One that lm-eval's own models wrote (`lm_eval --model vllm --include_path eval/tasks`) is a plain string, and is graded
here by the same verifier.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder
from distill.errors import DataError
from distill.problems.benchmark import read_benchmark
from distill.recipe import ContestDates, ReadLimits
from distill.records import Problem, Verdict
from distill.tables import read_records

NO_VERDICT = ("timeout", "infra_error")  # failures of ours, never the model's


def documents(problems: Sequence[Problem]) -> dict[str, Any]:
    """The split that lm-eval reads, one row a problem; `metadata` is a JSON string."""
    import datasets

    rows = [
        {
            "question": problem.prompt,
            "answer": problem.answer,
            "grader": problem.grader,
            "source": problem.source,
            "metadata": json.dumps(problem.metadata),
        }
        for problem in problems
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def problem_of(doc: Mapping[str, Any], prompt: str | None = None) -> Problem:
    """The document's problem; `prompt` is the text the model was given, where that is more than the question."""
    return Problem(
        prompt=prompt or doc["question"],
        answer=doc["answer"],
        grader=doc["grader"],
        source=doc["source"],
        metadata=json.loads(doc["metadata"]),
    )


def held_out(held_out: str = "", own: str = "", **_: Any) -> dict[str, Any]:
    """The run's held-out problems, or those of a suite of the recipe's own."""
    return documents(read_records(Path(own or held_out), Problem))


def benchmark(
    suite: str = "",
    bench_data: str | None = None,
    limits: Mapping[str, int] | None = None,
    contest_dates: Mapping[str, str | None] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The test split of the benchmark that the task file names."""
    problems = read_benchmark(suite, "test", bench_folder(bench_data), ReadLimits(**(limits or {})))
    return documents(between_dates(problems, ContestDates.model_validate(contest_dates or {})))


def between_dates(problems: Sequence[Problem], dates: ContestDates) -> list[Problem]:
    """Problems of contests between two dates, and those that have no date. Raises DataError where none is left."""
    chosen = [problem for problem in problems if dates.hold(problem.metadata.get("date"))]
    if not chosen:
        raise DataError(f"none of {len(problems)} questions lies between its dates", field="eval.contest_dates")
    return chosen


def reference(doc: Mapping[str, Any]) -> str:
    return str(doc["answer"])


def grade(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of one document from all its samples.

    A sample that could not be graded (`timeout`, `infra_error`) takes no part; with none left the document has no
    metric at all. Everything else that is not correct, a truncated answer included, counts as not correct.
    """
    verdicts = [verdict for verdict in _verdicts(doc, results[0]) if verdict.state not in NO_VERDICT]
    if not verdicts:
        return {}
    return {
        "pass@1": sum(verdict.correct for verdict in verdicts) / len(verdicts),
        "truncated": sum(verdict.state == "truncated" for verdict in verdicts) / len(verdicts),
    }


def counted(problem: Problem, verdict: Verdict) -> Verdict:
    """The verdict as a score takes it: a program that does not end in its time has failed its tests.

    Elsewhere a time-out is the grader's, and no verdict.
    """
    if problem.grader == "code" and verdict.state == "timeout":
        return verdict.model_copy(update={"state": "wrong"})
    return verdict


def _verdicts(doc: Mapping[str, Any], responses: Sequence[str]) -> list[Verdict]:
    carried = [getattr(response, "verdict", None) for response in responses]
    if all(carried):
        return [verdict for verdict in carried if verdict is not None]
    from distill.recipe import VerifyConfig
    from distill.verify import open_verifier

    problem = problem_of(doc)
    with open_verifier(VerifyConfig()) as verifier:
        verdicts = verifier.verify([(problem, str(response), "stop") for response in responses])
        return [counted(problem, verdict) for verdict in verdicts]
