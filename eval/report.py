"""The report: one HTML file that needs no network and no script, its figures as PNG, and `summary.json`.

What models wrote is hostile until shown otherwise: the template escapes everything, control characters and direction
overrides are made visible, and the page's own content policy allows no script and no request even if that failed.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.cores import num_cores
from distill.manifest import write_atomically
from distill.records import Record
from distill.verify.audit import AuditSummary
from eval.charts import accuracy_by_family, accuracy_by_parameters, filter_funnel, render, short_count
from eval.compare import METRIC, Comparison, Model, report_suspects, summary
from eval.tasks.processors import NO_VERDICT

TEMPLATE = Path(__file__).parent / "report.html.jinja"
MAX_TRACES = 6
MAX_TRACE_CHARACTERS = 6_000
ROLE_ORDER = {"teacher": 0, "base": 1, "direct": 2, "distilled": 3}
SHORT_ROLES = {"teacher": "teacher", "base": "base", "direct": "bare", "distilled": "distilled"}


def write_report(
    comparison: Comparison, out_dir: Path, *, elapsed_s: Callable[[], float], peak_rss_bytes: int
) -> list[str]:
    """Write index.html, the PNGs and summary.json; returns their names.

    `elapsed_s` and `peak_rss_bytes` are this stage's own cost so far: a report cannot wait for its own manifest.
    """
    figures = _figures(comparison)
    cost = {"name": "compare", "seconds": round(elapsed_s(), 3), "peak_rss_bytes": peak_rss_bytes}
    stages = [*comparison.stages, cost]
    page = _environment().from_string(TEMPLATE.read_text("utf-8")).render(_context(comparison, figures, stages))
    written: dict[str, str | bytes] = {
        "index.html": page,
        "summary.json": json.dumps({**summary(comparison), "stages": stages}, indent=2) + "\n",
    }
    for name, (_, pixels) in figures.items():
        written[f"{name}.png"] = pixels
    for name, data in written.items():
        write_atomically(out_dir / name, data)
    return sorted(written)


def _figures(comparison: Comparison) -> dict[str, tuple[str, bytes]]:
    about = "; ".join(
        f"{row.student} ({short_count(row.num_parameters)}): "
        + ", ".join(f"{role} {100 * card.value:.1f}%" for role, card in row.scores.items())
        for row in comparison.students
    )
    title = "Accuracy against parameters"
    figures = {
        "accuracy_by_parameters": render(accuracy_by_parameters(comparison), (8.6, 4.9), title, about),
    }
    if comparison.families:
        height = 1.5 + 0.42 * len(comparison.families)
        about = (
            "One row a family: mean pass@1 of bases, of students of bare answers, of distilled students, the teacher."
        )
        figures["accuracy_by_family"] = render(
            accuracy_by_family(comparison), (8.6, height), "Accuracy by family", about
        )
    if comparison.funnel:
        height = 1.2 + 0.42 * len(comparison.funnel)
        figures["filter_funnel"] = render(filter_funnel(comparison), (8.6, height), "Traces kept by each filter", "")
    return figures


def _context(
    comparison: Comparison, figures: Mapping[str, tuple[str, bytes]], stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    from markupsafe import Markup

    teacher = comparison.teacher and comparison.teacher.card(comparison.suite)
    rows = [row for model in comparison.models for row in model.rows]
    heat_groups, heat_rows = _heat(comparison)
    return {
        "name": comparison.name,
        "suite": comparison.suite,
        "metric": METRIC,
        "headline": headline(comparison),
        "size_verdict": comparison.size_verdict,
        "size_steps": [str(step) for step in comparison.size_steps],
        "tiles": _tiles(comparison),
        "students": comparison.students,
        "teacher": teacher,
        "families": comparison.families,
        # Markup: these two are drawn by `eval.charts`, which escapes what they say.
        "size_chart": Markup(figures["accuracy_by_parameters"][0]),
        "family_chart": Markup(figures["accuracy_by_family"][0]) if comparison.families else "",
        "heat_groups": heat_groups,
        "heat_rows": heat_rows,
        "traces": side_by_side(comparison),
        "funnel": [_funnel_step(step, comparison.funnel[0]["in"]) for step in comparison.funnel],
        "written": [
            {"name": name, "steps": [_funnel_step(step, steps[0]["in"]) for step in steps]}
            for name, steps in comparison.questions.items()
            if steps
        ],
        "num_hinted": comparison.num_hinted,
        "left_out": _left_out(comparison),
        "audit": _audit(comparison.audit) if comparison.audit and comparison.audit.answers else None,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "lineage": [_lineage(model, comparison.suite) for model in comparison.models],
        "fingerprints": _fingerprints(comparison),
        "ungraded": sum(row["verdict"] in NO_VERDICT for row in rows),
        "graded": len(rows),
        "overlap": _overlap(comparison),
        "version": _version(),
        "machine": _machine(),
    }


def headline(comparison: Comparison) -> str:
    """The one sentence that the page opens with, computed and never better than the intervals."""
    gains = [row.gains for row in comparison.students if row.gains]
    if not gains:
        return f"{len(comparison.models)} models on {comparison.suite}"
    clear = [all(difference.clear and difference.value > 0 for difference in of.values()) for of in gains]
    others = sorted({role for of in gains for role in of})
    rivals = " and ".join({"base": "its base", "direct": "its bare-answer twin"}[role] for role in others)
    if all(clear):
        smallest = min(difference.value for of in gains for difference in of.values())
        who = "Every distilled student" if len(gains) > 1 else "The distilled student"
        return f"{who} beats {rivals} by {math.floor(100 * smallest)} points or more"
    return f"{sum(clear)} of {len(gains)} distilled students clearly beat {rivals.replace('its', 'their')}"


def side_by_side(comparison: Comparison) -> list[dict[str, Any]]:
    """One question a family, up to six: where the teacher is right and the students differ most."""
    models = [m for m in (comparison.teacher, *comparison.of_role("distilled")) if m is not None]
    first = [
        {r["problem_id"]: r for r in m.rows if r["sample_index"] == 0 and r["suite"] == comparison.suite}
        for m in models
    ]
    if not any(first):
        return []
    shared = [problem for problem in first[0] if all(problem in of for of in first)]

    def rank(problem: str) -> tuple[bool, int, str]:
        right = [of[problem]["verdict"] == "correct" for of in first]
        mixed = abs(2 * sum(right) - len(right))  # 0: half of the models are right
        return (not right[0], mixed, problem)

    chosen: dict[str, str] = {}
    for problem in sorted(shared, key=rank):
        chosen.setdefault(first[0][problem]["family"], problem)
    best = sorted(chosen.values(), key=rank)[:MAX_TRACES]
    return [_trace(problem, models, first) for problem in best]


def _trace(problem: str, models: Sequence[Model], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [
        {
            "name": model.student if model.role != "teacher" else model.name,
            "role": model.role,
            **_answer_cells(of[problem]),
        }
        for model, of in zip(models, first, strict=True)
    ]
    row = first[0][problem]
    return {
        "family": words(row["family"]),
        "question": visible(row["prompt"]),
        "columns": columns,
        "right": sum(column["verdict"] == "correct" for column in columns),
    }


def _answer_cells(row: Mapping[str, Any]) -> dict[str, str]:
    text = visible(row["text"])
    if len(text) > MAX_TRACE_CHARACTERS:
        text = (
            f"{text[:MAX_TRACE_CHARACTERS]}\n… {len(text) - MAX_TRACE_CHARACTERS:,} more characters in samples.parquet"
        )
    return {"text": text, "verdict": str(row["verdict"]).replace("_", " ")}


def _funnel_step(step: Mapping[str, Any], num_traces: int) -> dict[str, Any]:
    """One filter: counts, shares in percent, and examples of what it dropped, made harmless to show."""
    examples = [{name: visible(text) for name, text in example.items()} for example in step["examples"]]
    dropped = step["in"] - step["out"]
    return {
        **step,
        "dropped": dropped,
        "share": f"{100 * dropped / step['in']:.1f}" if dropped else "0",
        "kept_width": f"{100 * step['out'] / num_traces:.2f}" if num_traces else "0",
        "in_width": f"{100 * step['in'] / num_traces:.2f}" if num_traces else "0",
        "kept_share": f"{100 * step['out'] / num_traces:.1f}" if num_traces else "0",
        "examples": examples,
    }


def _audit(audit: AuditSummary) -> dict[str, Any]:
    """The second grader's counts and what it says, texts made harmless to show."""

    def printable(record: Record) -> dict[str, Any]:
        return {name: visible(value) if isinstance(value, str) else value for name, value in record}

    return {
        **audit.model_dump(),
        "examples": [printable(one) for one in audit.examples],
        "suspects": [printable(one) for one in report_suspects(audit)],
        "num_suspects": len(audit.suspected_references),
        "num_relabelled": len(audit.relabelled),
        "num_relabelled_samples": audit.num_relabelled_samples,
    }


def visible(text: str) -> str:
    """Text that shows what it holds: control and format characters (direction overrides too) become `\\u202e`."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else f"\\u{ord(character):04x}"
        for character in text
    )


def _tiles(comparison: Comparison) -> list[dict[str, str]]:
    tiles = []
    distilled = [card for model in comparison.of_role("distilled") if (card := model.card(comparison.suite))]
    if distilled:
        best = max(distilled, key=lambda card: card.value)
        name = best.name.removesuffix("-distilled")
        tiles.append(
            {
                "name": "best distilled student",
                "value": f"{100 * best.value:.1f}%",
                "note": f"{name}, {short_count(best.num_parameters)} parameters",
            }
        )
    gains = [(row.gains["base"], row) for row in comparison.students if "base" in row.gains]
    if gains:
        mean = sum(gain.value for gain, _ in gains) / len(gains)
        low = min(gain.value for gain, _ in gains)
        tiles.append(
            {
                "name": "mean gain over base",
                "value": f"{100 * mean:+.1f} pt",
                "note": f"smallest {100 * low:+.1f}, {len(gains)} students",
            }
        )
    teacher = comparison.teacher and comparison.teacher.card(comparison.suite)
    if teacher:
        size = f", {short_count(teacher.num_parameters)} parameters" if teacher.num_parameters else ""
        note = f"{words(teacher.architecture)}{size}"
        tiles.append({"name": "teacher", "value": f"{100 * teacher.value:.1f}%", "note": note})
    if comparison.funnel:
        kept, of = comparison.funnel[-1]["out"], comparison.funnel[0]["in"]
        note = f"of {of:,} traces" + (f", {kept / of:.0%}" if of else "")
        tiles.append({"name": "training examples kept", "value": f"{kept:,}", "note": note})
    return tiles


def _heat(comparison: Comparison) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Column groups (teacher, then each student with its roles) and a row a family."""
    groups: dict[str, list[Model]] = {}
    order = [model for role in ("teacher", "base", "direct", "distilled") for model in comparison.of_role(role)]
    size = {model.student: model.cards[0].num_parameters for model in comparison.of_role("distilled") or order}
    for model in sorted(
        order, key=lambda m: (m.role != "teacher", size.get(m.student, 0), m.student, ROLE_ORDER[m.role])
    ):
        groups.setdefault(model.student if model.role != "teacher" else "", []).append(model)
    heads = [
        {"name": name, "columns": [{"label": SHORT_ROLES[model.role]} for model in models]}
        for name, models in groups.items()
    ]
    rows = []
    for family in comparison.families:
        cells = []
        for models in groups.values():
            for place, model in enumerate(models):
                card = model.card(f"{comparison.suite}/{family}")
                percent = None if card is None else round(100 * card.value)
                cells.append({"role": model.role, "percent": percent, "start": place == 0})
        rows.append({"name": words(family), "cells": cells})
    return heads, rows


def _lineage(model: Model, suite: str) -> dict[str, Any]:
    card = model.card(suite) or model.cards[0]
    counts = model.manifest.counts if model.manifest else {}
    outputs = model.manifest.outputs if model.manifest else {}
    tokens = [row["num_tokens"] for row in model.rows]
    truncated = sum(row["verdict"] == "truncated" for row in model.rows)
    return {
        **card.model_dump(),
        "mean_tokens": f"{sum(tokens) / len(tokens):,.0f}" if tokens else "–",
        "truncated": f"{truncated / len(tokens):.1%}" if tokens else "–",
        "weights": str(counts.get("identity", {}).get("weights", "–"))[:12],
        "samples": outputs.get("samples.parquet", "–")[:12],
    }


def _left_out(comparison: Comparison) -> list[dict[str, Any]]:
    """Examples that were too long for a student, counted in its own tokens."""
    trained = comparison.manifests.get("distill")
    counts = trained.counts if trained is not None else {}
    dropped, tokens = counts.get("dropped", {}), counts.get("dropped_tokens", {})
    return [{"name": name, "examples": count, "tokens": tokens[name]} for name, count in dropped.items() if count]


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


def _machine() -> str:
    return f"{platform.machine()}, {num_cores()} CPU cores, Python {platform.python_version()}"


def words(name: str) -> str:
    """`spell_backward` as a person writes it."""
    return name.replace("_", " ")


def duration(seconds: float) -> str:
    """`8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def _version() -> str:
    try:
        return importlib.metadata.version("potstill")
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": short_count, "words": words, "duration": duration, "size": size}
    return environment
