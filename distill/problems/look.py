"""What a file of questions holds, as far as names and values tell: question, answer, how an answer is graded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from distill.errors import DataError, RecipeError, nearest
from distill.problems import local
from distill.recipe import DEFAULT_LIMITS, Grader, LocalSource

# Names that public data sets give their fields, the likeliest first.
QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input", "text")
ANSWERS = ("answer", "final_answer", "expected_answer", "reference", "label", "target", "solution", "output")
CODE_ANSWERS = ("canonical_solution", "code")
CHOICES = ("choices", "options")
TESTS = ("tests", "test", "test_list")
SETUPS = ("setup", "test_setup_code")
ENTRY_POINTS = ("entry_point",)
NUM_ROWS = 200  # looked at; all are read when the recipe is checked


def look_at(
    path: str,
    *,
    base_dir: Path,
    grader: str | None = None,
    prompt_field: str | None = None,
    answer_field: str | None = None,
) -> LocalSource:
    """A source for the file, what is not given being read off its first rows.

    Raises DataError for a file that is not there or not rows of questions, naming the fields that it has, and
    RecipeError for a grader that there is not.
    """
    if grader is not None and grader not in get_args(Grader):
        raise RecipeError(f"{grader!r} is not known; {nearest(grader, get_args(Grader))}", where="grader")
    where = local.file_path(LocalSource(path=path), base_dir)
    rows = [row for _, row in islice(local.read_rows(where, DEFAULT_LIMITS), NUM_ROWS)]
    if not rows:
        raise DataError("holds no questions", where=where)
    tests = _first(TESTS, rows) if grader in (None, "code") else None
    choices = _first(CHOICES, rows) if grader in (None, "choice") else None
    prompt_field = prompt_field or _first(QUESTIONS, rows)
    answer_field = answer_field or _first((*ANSWERS, *(CODE_ANSWERS if tests else ())), rows)
    for name, option in ((prompt_field, "prompt"), (answer_field, "answer")):
        if name is None:
            message = f"no field looks like the {option}; it has {', '.join(map(str, rows[0]))}"
            raise DataError(message, where=where, field=f"{option}_field")
    assert prompt_field is not None
    assert answer_field is not None
    guess: Grader = "code" if tests else "choice" if choices else _grader(row.get(answer_field) for row in rows)
    if grader == "code" and tests is None:
        raise DataError(f"programs need tests, in a field {', '.join(TESTS)}", where=where, field="tests_field")
    return LocalSource(
        path=path,
        prompt_field=prompt_field,
        answer_field=answer_field,
        choices_field=choices,
        grader=cast(Grader, grader or guess),
        tests_field=tests,
        setup_field=_first(SETUPS, rows) if tests else None,
        entry_point_field=_first(ENTRY_POINTS, rows) if tests else None,
    )


def _first(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first of the names that every row has."""
    return next((name for name in names if all(name in row for row in rows)), None)


def _grader(answers: Iterable[Any]) -> Grader:
    """`math`, unless most answers are words: only a model can tell whether a sentence says the same as another."""
    finals = [str(answer).rpartition("####")[2] for answer in answers if answer is not None]
    prose = [text for text in finals if len(re.findall(r"(?<!\\)\b[A-Za-z]{3,}", text)) > 2]
    return "judge" if 2 * len(prose) > len(finals) else "math"
