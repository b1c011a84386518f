"""The report: one HTML file that needs no network and no script, with what stands beside it.

index.html                                  every suite; at most 300 traces, at most 3 MB
traces/<suite>-001.html ...                 all questions, the first sample of every model
accuracy_by_parameters-<suite>.png ...      the charts
scores.csv, summary.md, summary.json        all scores, for programs and for text
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.manifest import atomic_folder, write_atomically
from distill.progress import Progress, Task, silent
from eval.across import difference_of, run_pairs
from eval.charts import (
    Figure,
    filter_funnel,
    picture,
    short_count,
)
from eval.compare import Comparison, SuiteComparison
from eval.conditions import conditions, shown_conditions
from eval.curation import curation_context
from eval.figures import family_chart, figures_of, markup, size_chart, tables_csv, tradeoff_chart
from eval.leaks import leaks_context, leaks_csv
from eval.page import heat_tables, template, visible, words
from eval.scored import METRIC, Model, first_answers
from eval.sizes import size_fit
from eval.summary import best_rule, detectable_sentence, run_device, scores_csv, summary, summary_markdown
from eval.traces import SuiteTraces, compared, page_names, side_by_side, slug, write_pages
from eval.tradeoffs import fronts, tradeoff_rows

MAX_PAGE_BYTES = 3_000_000
SUITES_A_TABLE = 5

MAX_MATRIX = 9  # models; pairs.csv has every pair
TRACES = "traces"


def write_report(
    comparison: Comparison,
    out_dir: Path,
    *,
    elapsed_s: Callable[[], float],
    peak_rss_bytes: Callable[[], int],
    device: str,
    progress: Progress | None = None,
) -> list[str]:
    """Write the report into `out_dir`; returns the names of its files, that of the folder of traces among them.

    `elapsed_s`, `peak_rss_bytes` and `device` are this stage's own: a report cannot wait for its own manifest.
    """
    with (progress or silent()).task("write report", None, unit="files") as task:
        traces = _read_traces(comparison, task)
        facts = {"name": comparison.name, "version": _version()}
        with _anew(out_dir / TRACES) as folder:
            for of_suite in traces:
                for _ in write_pages(of_suite, folder, facts):
                    task.advance(1)
        figures = figures_of(comparison, task)
        files = {name: (figure.pixels, figure.vector) for name, figure in figures.items()}
        if comparison.funnel:
            files["filter_funnel"] = picture(filter_funnel(comparison.funnel), 1.2 + 0.42 * len(comparison.funnel))
        cost = {"name": "compare", "seconds": round(elapsed_s(), 3), "peak_rss_bytes": peak_rss_bytes()}
        stages = [*comparison.stages, {**cost, "device": device}]
        written: dict[str, str | bytes] = {
            "index.html": _page({**facts, **_context(comparison, figures, stages)}, traces),
            "scores.csv": scores_csv(comparison),
            "summary.md": summary_markdown(comparison, stages),
            "summary.json": json.dumps(summary(comparison, stages), indent=2) + "\n",
        }
        if comparison.contamination is not None:
            written["contamination.csv"] = leaks_csv(comparison.contamination)
        written |= {f"{name}.png": pixels for name, (pixels, _) in files.items()}
        written |= {f"{name}.svg": vector for name, (_, vector) in files.items()}
        written |= tables_csv(comparison)
        for name, data in written.items():
            write_atomically(out_dir / name, data)
    _delete_others(out_dir, written)
    return sorted([*written, TRACES])


def _read_traces(comparison: Comparison, task: Task) -> list[SuiteTraces]:
    shown = {}
    for model in comparison.models:
        shown[model.name] = first_answers(model.samples)
        task.advance(1)
    return [
        SuiteTraces.of(suite, {model.name: shown[model.name] for model in suite.models}) for suite in comparison.suites
    ]


def _page(context: Mapping[str, Any], traces: Sequence[SuiteTraces]) -> str:
    """The page, with as many traces as it has room for."""
    page = template("report.html.jinja")
    pages = {of_suite.suite.name: page_names(of_suite) for of_suite in traces}

    def render_with(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        suites = [
            {**suite, "traces": shown[suite["name"]], "pages": pages[suite["name"]]} for suite in context["suites"]
        ]
        return str(page.render({**context, "suites": suites}))

    bare = render_with(dict.fromkeys(pages, ()))
    return render_with(side_by_side(traces, MAX_PAGE_BYTES - len(bare.encode())))


@contextmanager
def _anew(folder: Path) -> Iterator[Path]:
    """A folder in the place of the one that is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
    with atomic_folder(folder) as made:
        yield made


def _delete_others(out_dir: Path, written: Mapping[str, Any]) -> None:
    """Charts of suites that are no longer scored."""
    for path in (*out_dir.glob("*.png"), *out_dir.glob("*.svg"), *out_dir.glob("*.csv")):
        if path.name not in written:
            path.unlink()


def _context(
    comparison: Comparison, figures: Mapping[str, Figure], stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    answers = [of_suite for model in comparison.models for of_suite in model.answers.values()]
    return {
        "device": run_device(stages),
        "metric": METRIC,
        "headline": headline(comparison),
        "best": _best_sentence(comparison),
        "best_rule": best_rule(comparison),
        "tiles": _tiles(comparison),
        "overview": _overview(comparison),
        "runs": _runs(comparison),
        "suites": [_suite(comparison, suite, figures) for suite in comparison.suites],
        "price_per_hour": comparison.price_per_hour,
        "training_chart": markup(figures.get("training_curves")),
        "leaks": leaks_context(comparison),
        **curation_context(comparison),
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "lineage": [_lineage(model) for model in comparison.models],
        "fingerprints": _fingerprints(comparison),
        "ungraded": sum(of_suite.ungraded for of_suite in answers),
        "unverifiable": sum(of_suite.unverifiable for of_suite in answers),
        "samples": sum(of_suite.num_samples for of_suite in answers),
        "overlap": _overlap(comparison),
        "graders": sorted({conditions(model, model.suites[0]).graders or "" for model in comparison.models} - {""}),
    }


def headline(comparison: Comparison) -> str:
    """The one sentence that the page opens with, computed and never better than the intervals."""
    suite = comparison.deciding
    gained = [row.gained for row in suite.students if row.gained]
    if not gained:
        return f"{len(suite.models)} models on {suite.name}"
    clear = [all(difference.clear and difference.value > 0 for difference in of.values()) for of in gained]
    others = sorted({role for of in gained for role in of})
    rivals = " and ".join({"base": "its base", "direct": "its bare-answer twin"}[role] for role in others)
    if all(clear):
        smallest = min(difference.value for of in gained for difference in of.values())
        who = "Every distilled student" if len(gained) > 1 else "The distilled student"
        return f"{who} beats {rivals} by {math.floor(100 * smallest)} points or more on {suite.name}"
    theirs = rivals.replace("its", "their")
    return f"{sum(clear)} of {len(gained)} distilled students clearly beat {theirs} on {suite.name}"


def _best_sentence(comparison: Comparison) -> str:
    if comparison.best is None:
        return f"No distilled student is scored on {comparison.deciding_suite}."
    student = comparison.best.name.removesuffix("-distilled")
    return f"Best student: {student}, by the {best_rule(comparison)}."


def _tiles(comparison: Comparison) -> list[dict[str, str]]:
    tiles = []
    suite = comparison.deciding
    if best := comparison.best:
        name = best.name.removesuffix("-distilled")
        note = f"{name}, {short_count(best.num_parameters)} parameters"
        tiles.append({"name": f"best student on {suite.name}", "value": f"{100 * best.value:.1f}%", "note": note})
    gains = [row.gained["base"].value for row in suite.students if "base" in row.gained]
    if gains:
        tiles.append(
            {
                "name": f"mean gain over base on {suite.name}",
                "value": f"{100 * sum(gains) / len(gains):+.1f} pt",
                "note": f"smallest {100 * min(gains):+.1f}, {len(gains)} students",
            }
        )
    if (teacher := suite.teacher) and not comparison.runs:
        size = f", {short_count(teacher.num_parameters)} parameters" if teacher.num_parameters else ""
        note = f"{words(teacher.architecture)}{size}"
        tiles.append({"name": f"teacher on {suite.name}", "value": f"{100 * teacher.value:.1f}%", "note": note})
    if comparison.funnel:
        kept, of = comparison.funnel[-1]["out"], comparison.funnel[0]["in"]
        note = f"of {of:,} traces" + (f", {kept / of:.0%}" if of else "")
        tiles.append({"name": "training examples kept", "value": f"{kept:,}", "note": note})
    return tiles


def _overview(comparison: Comparison) -> list[dict[str, Any]]:
    """Distilled students on every suite, teacher first; some suites a table, so that none is wider than the page."""
    tables = []
    for first in range(0, len(comparison.suites), SUITES_A_TABLE):
        suites = comparison.suites[first : first + SUITES_A_TABLE]
        teachers = [model for model in comparison.models if model.role == "teacher"]
        rows = [
            {
                "name": model.name,
                "key": "teacher",
                "best": False,
                "num_parameters": model.num_parameters,
                "cells": [{"suite": suite.name, "card": model.card(suite.name), "gained": None} for suite in suites],
            }
            for model in teachers
        ]
        rows += [_overview_row(comparison, student, suites) for student in comparison.students]
        tables.append({"suites": [suite.name for suite in suites], "rows": rows})
    return tables


def _overview_row(comparison: Comparison, student: str, suites: Sequence[SuiteComparison]) -> dict[str, Any]:
    of_student = {suite.name: row for suite in suites for row in suite.students if row.student == student}
    cells = []
    for suite in suites:
        row = of_student.get(suite.name)
        card, gained = (row.scores.get("distilled"), row.gained.get("base")) if row else (None, None)
        cells.append({"suite": suite.name, "card": card, "gained": gained})
    best = comparison.best
    return {
        "name": student,
        "key": None,
        "best": best is not None and best.name == f"{student}-distilled",
        "num_parameters": max(model.num_parameters for model in comparison.models if model.student == student),
        "cells": cells,
    }


def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    """What each of several runs holds."""
    return [
        {
            "name": name,
            "models": len(one.models),
            "suites": ", ".join(suite.name for suite in one.suites),
            "examples": one.funnel[-1]["out"] if one.funnel else None,
            "seconds": sum(stage["seconds"] for stage in one.stages),
            "device": run_device(one.stages),
        }
        for name, one in comparison.runs.items()
    ]


def _suite(comparison: Comparison, suite: SuiteComparison, figures: Mapping[str, Figure]) -> dict[str, Any]:
    answers = [_suite_answers(model, suite.name) for model in suite.models]
    rows = []
    for family in suite.families:
        cards = {model.name: model.card(f"{suite.name}/{family}") for model in suite.models}
        values = {name: None if card is None else card.value for name, card in cards.items()}
        rows.append({"name": words(visible(family)), "values": values})
    return {
        "name": suite.name,
        "slug": slug(suite.name),
        "num_questions": max(one["num_questions"] for one in answers),
        "samples_per_question": max(one["samples_per_question"] for one in answers),
        "students": suite.students,
        "run_pairs": run_pairs(suite.models, suite.name),
        "size_chart": markup(figures.get(size_chart(suite))),
        "size_verdict": suite.size_verdict,
        "detectable": detectable_sentence(suite),
        "size_steps": [str(step) for step in suite.size_steps],
        "size_fit": str(size_fit(suite, comparison.curves) or ""),
        "tradeoffs": tradeoff_rows(suite, found) if (found := fronts(suite, comparison.price_per_hour)) else [],
        "tradeoff_chart": markup(figures.get(tradeoff_chart(suite))),
        "matrix": _matrix(suite),
        "answers": answers,
        "consensus": next((one["consensus"].metric for one in answers if one["consensus"]), None),
        "family_chart": markup(figures.get(family_chart(suite))),
        "heat": heat_tables(suite.models, rows),
    }


def _matrix(suite: SuiteComparison) -> list[dict[str, Any]]:
    """Teacher and distilled students against each other, row minus column; of more than a page holds, none."""
    models = compared(suite)
    if not 1 < len(models) <= MAX_MATRIX:
        return []
    rows = []
    for model in models:
        cells = [
            {"name": other.name, "pair": None if other is model else difference_of(model, other, suite.name)}
            for other in models
        ]
        rows.append({"name": model.name, "role": model.role, "cells": cells})
    return rows


def _suite_answers(model: Model, suite: str) -> dict[str, Any]:
    answers = model.answers[suite]
    return {
        **{name: value for name, value in vars(answers).items() if name != "means"},
        "name": model.name,
        "role": model.role,
        "card": model.card(suite),
        "consensus": model.consensus(suite),
        "num_questions": len(answers.means),
        "engine": shown_conditions(model, suite)["engine"],
        "dtype": shown_conditions(model, suite)["dtype"],
    }


def _lineage(model: Model) -> dict[str, Any]:
    outputs = model.manifest.outputs if model.manifest else {}
    return {
        **model.cards[0].model_dump(),
        "weights": model.identity.get("weights", "–")[:12],
        "template": model.identity.get("template", "–")[:12],
        "samples": outputs.get("samples.parquet", "–")[:12],
    }


def _fingerprints(comparison: Comparison) -> list[dict[str, str]]:
    wanted = ("potstill", "torch", "transformers", "trl", "lm-eval", "math-verify", "reasoning-gym")
    shown, last = [], ""
    for name, manifest in comparison.manifests.items():
        versions = " · ".join(
            f"{package} {manifest.versions[package]}" for package in wanted if package in manifest.versions
        )
        shown.append(
            {
                "name": name,
                "fingerprint": manifest.fingerprint[:16],
                "versions": "as above" if versions == last else versions,
            }
        )
        last = versions
    return shown


def _overlap(comparison: Comparison) -> str:
    counts = comparison.manifests["eval"].counts if "eval" in comparison.manifests else {}
    if not counts.get("training_questions"):
        return ""
    return (
        f"Checked when the scores were made: of {counts['held_out']:,} held-out questions, "
        f"{counts['shared_with_training']} occur among the {counts['training_questions']:,} training questions."
    )


def _version() -> str:
    try:
        return importlib.metadata.version("potstill")
    except importlib.metadata.PackageNotFoundError:
        return "from source"
