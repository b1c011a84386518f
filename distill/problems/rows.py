"""One row of a table of questions to one `Problem`: shared by local files and data sets of the Hub.

A row's answer may be a string or a number; a worked answer in GSM8K's form (`... #### 42`) counts from its last
`####`. Programs are graded by their tests: see `distill.problems.code`. Multiple choice: `choices` is a list of texts,
or ARC's `{"text": [...], "label": [...]}`; the answer is a letter, a label, one of the texts, or the position counted
from 0. The choices are written under the question, one a line (`A. ...`), because the model has to see them; the
reference becomes the letter.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Literal

from distill.errors import DataError, nearest
from distill.problems.code import code_problem
from distill.recipe import DatasetSource, LocalSource
from distill.records import Problem


def problem_of(row: Mapping[str, Any], source: LocalSource | DatasetSource, *, name: str, where: str) -> Problem:
    """Raises DataError naming `where` (file and line) and the field that is missing or of the wrong kind."""
    prompt = _field(row, source.prompt_field, where)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"must be a text, got {prompt!r}", where=where, field=source.prompt_field)
    # What a judge compares needs no reference.
    answer = row.get(source.answer_field) if source.grader == "judge" else _field(row, source.answer_field, where)
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise DataError(f"must be a text or a number, got {answer!r}", where=where, field=source.answer_field)
    if source.choices_field is not None:
        return _choice(prompt, answer, row, source, name=name, where=where)
    if source.grader == "code":
        return code_problem(prompt, None if answer is None else str(answer), row, source, name=name, where=where)
    text = None if answer is None else str(answer).rpartition("####")[2].strip()
    return Problem(prompt=prompt, answer=text or None, grader=source.grader, source=name)


def fields_of(source: LocalSource | DatasetSource) -> list[str]:
    """The fields of a row that are read."""
    optional = (source.choices_field, source.tests_field, source.setup_field, source.entry_point_field)
    return [source.prompt_field, source.answer_field, *filter(None, optional)]


def _field(row: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise DataError(f"missing; {nearest(field, map(str, row))}", where=where, field=field)
    return row[field]


def _choice(
    prompt: str,
    answer: str | float | None,
    row: Mapping[str, Any],
    source: LocalSource | DatasetSource,
    *,
    name: str,
    where: str,
) -> Problem:
    assert source.choices_field is not None
    value = _field(row, source.choices_field, where)
    labels: list[str] = []
    if isinstance(value, Mapping):
        labels = [str(label) for label in value.get("label", [])]
        value = value.get("text")
    if not isinstance(value, list) or not 2 <= len(value) <= 26 or not all(isinstance(text, str) for text in value):
        raise DataError(f"must be 2 to 26 texts, got {value!r}", where=where, field=source.choices_field)
    letters = string.ascii_uppercase[: len(value)]
    letter = None if answer is None else _letter(answer, value, labels)
    if answer is not None and letter is None:
        raise DataError(f"{answer!r} is none of the {len(value)} choices", where=where, field=source.answer_field)
    listing = "\n".join(f"{mark}. {text}" for mark, text in zip(letters, value, strict=True))
    grader: Literal["math", "choice"] = "choice"
    return Problem(
        prompt=f"{prompt}\n{listing}", answer=letter, grader=grader, source=name, metadata={"choices": list(value)}
    )


def _letter(answer: str | float, choices: list[str], labels: list[str]) -> str | None:
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, str):
        for known in (labels, list(letters), choices, [text.strip() for text in choices]):
            if answer.strip() in known:
                return letters[known.index(answer.strip())]
        return None
    position = int(answer)
    return letters[position] if position == answer and 0 <= position < len(choices) else None
