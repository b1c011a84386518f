"""Contamination as the report, `summary.json` and `contamination.csv` show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.compare import Comparison, SuiteComparison
from eval.contamination import CleanScore, Contamination, LeakedQuestion, LeakingExample, scores_without
from eval.page import visible
from eval.table import csv_text

MAX_SHOWN = 20  # leaked questions of a suite in the page; contamination.csv has all


def leaks_context(comparison: Comparison) -> dict[str, Any] | None:
    """The variables of `contamination.html.jinja`; None where there was nothing to look through."""
    found = comparison.contamination
    if found is None:
        return None
    return {
        "training_sets": found.training_sets,
        "num_leaked": sum(len(found.question_ids(suite.name)) for suite in comparison.suites),
        "suites": [_suite(suite, found) for suite in comparison.suites],
    }


def leaks_summary(comparison: Comparison) -> dict[str, Any] | None:
    """`summary.json`'s part: counts, the questions' ids, and every model's score without them."""
    found = comparison.contamination
    if found is None:
        return None
    return {
        "training_sets": [one.model_dump(mode="json") for one in found.training_sets],
        "suites": [
            {
                "suite": suite.name,
                "num_questions": num_questions(suite),
                "num_leaked": len(found.question_ids(suite.name)),
                "leaked": sorted(found.question_ids(suite.name)),
                "models": [_clean(score) for score in _scores(suite, found)],
            }
            for suite in comparison.suites
        ],
    }


def leaks_csv(found: Contamination) -> str:
    """One row a question, training set and example that is kept."""
    columns = ("suite", "question_id", "question", "training_set", "num_examples")
    kept = ("row", "problem_id", "trace_key", "part", "test", "matched")
    rows = [
        {name: getattr(one, name) for name in columns} | {name: getattr(example, name) for name in kept}
        for one in found.leaked
        for example in one.examples
    ]
    return csv_text((*columns, *kept), rows)


def num_questions(suite: SuiteComparison) -> int:
    return max(len(model.answers[suite.name].means) for model in suite.models)


def _scores(suite: SuiteComparison, found: Contamination) -> list[CleanScore]:
    left_out = found.question_ids(suite.name)
    return scores_without(suite.models, suite.name, left_out) if left_out else []


def _clean(score: CleanScore) -> dict[str, Any]:
    clean, change = score.clean, score.change
    return {
        "name": score.model,
        "clean": None if clean is None else {"value": clean.value, "stderr": clean.stderr, "ci95": list(clean.ci95)},
        "num_questions": 0 if clean is None else clean.num_questions,
        "change": None if change is None else {"value": change.value, "ci95": list(change.ci95)},
    }


def _suite(suite: SuiteComparison, found: Contamination) -> dict[str, Any]:
    leaked = found.of_suite(suite.name)
    by_set = {
        one.name: len({of.question_id for of in leaked if of.training_set == one.name}) for one in found.training_sets
    }
    rows = [
        {
            "name": score.model,
            "role": score.role,
            "full": model.card(suite.name),
            "clean": score.clean,
            "change": score.change,
        }
        for model, score in zip(suite.models, _scores(suite, found), strict=False)
    ]
    questions: dict[str, list[LeakedQuestion]] = {}
    for one in leaked:
        questions.setdefault(one.question_id, []).append(one)
    shown = list(questions.values())[:MAX_SHOWN]
    return {
        "name": suite.name,
        "num_questions": num_questions(suite),
        "num_leaked": len(questions),
        "by_set": by_set,
        "rows": rows,
        "shown": [_question(of_question) for of_question in shown],
    }


def _question(of_question: Sequence[LeakedQuestion]) -> dict[str, Any]:
    first = of_question[0]
    return {
        "id": first.question_id,
        "question": visible(first.question),
        "examples": [
            {**_example(example), "training_set": one.training_set, "num_examples": one.num_examples}
            for one in of_question
            for example in one.examples[:1]
        ],
    }


def _example(example: LeakingExample) -> Mapping[str, Any]:
    texts = {name: visible(getattr(example, name)) for name in ("before", "matched", "after")}
    return example.model_dump() | texts
