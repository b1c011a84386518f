"""What models wrote, side by side: some questions in the report, all of them in pages beside it.

Shown is the first sample of each model, questions that say most first: those that the teacher solves and the students
differ in. `samples.parquet` of a model has all its samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import escape

from eval.compare import SuiteComparison
from eval.page import heat_tables, template, visible, words
from eval.scored import Model, ShownAnswer

MAX_TRACES = 300  # in the report, and in each page beside it
QUESTIONS_SHOWN = 6  # of a suite in the report
MAX_NAME = 90  # characters of a question in the overview of a page

Shown = Mapping[tuple[str, str], ShownAnswer]  # by suite and question


@dataclass(frozen=True)
class SuiteTraces:
    """The first samples of one suite's models; `order` are its questions, those that say most first."""

    suite: SuiteComparison
    shown: Mapping[str, Shown]  # by model
    order: tuple[str, ...]

    @classmethod
    def of(cls, suite: SuiteComparison, shown: Mapping[str, Shown]) -> SuiteTraces:
        judged = [shown[model.name] for model in compared(suite)]
        questions = dict.fromkeys(question for of in shown.values() for name, question in of if name == suite.name)

        def rank(question: str) -> tuple[bool, int, str]:
            answers = [of.get((suite.name, question)) for of in judged]
            right = [answer is not None and answer.verdict == "correct" for answer in answers]
            mixed = abs(2 * sum(right) - len(right))  # 0: half of the models are right
            return (not right[0], mixed, question)

        return cls(suite, shown, tuple(sorted(questions, key=rank)))

    def chosen(self, max_questions: int) -> list[str]:
        """Questions for the report: one a family, then more of any."""
        firsts: dict[str, str] = {}
        for question in self.order:
            firsts.setdefault(self._any(question).family, question)
        one_each = set(firsts.values())
        more = (question for question in self.order if question not in one_each)
        return [*firsts.values(), *more][:max_questions]

    def trace(self, question: str, models: Sequence[Model]) -> dict[str, Any]:
        """One question as the templates show it, made harmless."""
        known = self._any(question)
        of_models = [(model, self.shown[model.name].get((self.suite.name, question))) for model in models]
        columns = [_column(model, answer) for model, answer in of_models if answer is not None]
        return {
            "family": words(visible(known.family)),
            "question": visible(known.prompt),
            "reference": visible(known.reference),
            "columns": columns,
            "right": sum(column["verdict"] == "correct" for column in columns),
        }

    def _any(self, question: str) -> ShownAnswer:
        return next(of[self.suite.name, question] for of in self.shown.values() if (self.suite.name, question) in of)


def compared(suite: SuiteComparison) -> list[Model]:
    """The models whose traces stand side by side in the report: teacher and distilled students, or all."""
    return [*suite.of_role("teacher"), *suite.of_role("distilled")] or list(suite.models)


def side_by_side(suites: Sequence[SuiteTraces], size_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """The report's own traces by suite: at most MAX_TRACES, and as many as `size_bytes` of the page hold."""
    columns = sum(len(compared(traces.suite)) for traces in suites)
    each = min(QUESTIONS_SHOWN, MAX_TRACES // max(1, columns))
    taken: dict[str, list[dict[str, Any]]] = {traces.suite.name: [] for traces in suites}
    places = [(place, traces) for traces in suites for place in enumerate(traces.chosen(each))]
    for (_, question), traces in sorted(places, key=lambda entry: entry[0][0]):  # every suite's first ones first
        trace = traces.trace(question, compared(traces.suite))
        size_bytes -= _page_bytes(trace)
        if size_bytes < 0:
            break
        taken[traces.suite.name].append(trace)
    return taken


def page_names(traces: SuiteTraces) -> list[str]:
    """The pages beside the report that hold all questions of a suite, relative to it."""
    count = -(-len(traces.order) // _questions_per_page(traces.suite))
    return [f"traces/{slug(traces.suite.name)}-{number:03d}.html" for number in range(1, count + 1)]


def write_pages(traces: SuiteTraces, folder: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Write the pages of a suite into `folder`; yields each one's name. `facts` are the run's name and our version."""
    per_page = _questions_per_page(traces.suite)
    names = [Path(name).name for name in page_names(traces)]
    page = template("traces.html.jinja")
    for number, name in enumerate(names, start=1):
        first = (number - 1) * per_page
        questions = traces.order[first : first + per_page]
        shown = [traces.trace(question, traces.suite.models) for question in questions]
        numbered = [{**trace, "number": place, "id": f"q{place}"} for place, trace in enumerate(shown, start=first + 1)]
        context = {
            **facts,
            "title": f"{facts['name']}, {traces.suite.name}, page {number}",
            "suite": traces.suite.name,
            "slug": slug(traces.suite.name),
            "pages": names,
            "number": number,
            "first": first + 1,
            "last": first + len(questions),
            "num_questions": len(traces.order),
            "grids": _grids(traces.suite, questions, numbered),
            "traces": numbered,
        }
        (folder / name).write_text(page.render(context), encoding="utf-8")
        yield name


def slug(name: str) -> str:
    """A suite's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _questions_per_page(suite: SuiteComparison) -> int:
    return max(1, MAX_TRACES // len(suite.models))


def _grids(
    suite: SuiteComparison, questions: Sequence[str], shown: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Question by model: the share of its samples that are right."""
    rows = []
    for question, trace in zip(questions, shown, strict=True):
        text = " ".join(trace["question"].split())
        name = f"{trace['number']}. {text if len(text) <= MAX_NAME else f'{text[: MAX_NAME - 1]}…'}"
        values = {model.name: model.answers[suite.name].means.get(question) for model in suite.models}
        rows.append({"name": name, "link": f"#{trace['id']}", "values": values})
    return heat_tables(suite.models, rows)


def _column(model: Model, answer: ShownAnswer) -> dict[str, Any]:
    return {
        "name": model.name,
        "role": model.role,
        "text": visible(answer.text),
        "verdict": answer.verdict,
        "extracted": visible(answer.extracted),
        "num_tokens": answer.num_tokens,
    }


def _page_bytes(trace: Mapping[str, Any]) -> int:
    """About what a trace takes in a page: its texts as they are escaped, and the tags around them."""
    texts = [trace["question"], trace["reference"]]
    texts += [text for column in trace["columns"] for text in (column["text"], column["extracted"])]
    return sum(len(str(escape(text)).encode()) for text in texts) + 600 * (len(trace["columns"]) + 1)
