"""Which charts a report has, and the numbers behind them as CSV."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from distill.progress import Task
from eval.across import pair_row
from eval.charts import Figure, accuracy_by_family, accuracy_by_parameters, render, short_count, training_curves
from eval.compare import Comparison, SuiteComparison
from eval.table import csv_text
from eval.traces import slug
from eval.tradeoffs import accuracy_against, fronts, tradeoff_rows
from eval.training_curves import curve_rows

CHART_INCHES = 4.9


def figures_of(comparison: Comparison, task: Task) -> dict[str, Figure]:
    figures = {}

    def add(name: str, *arguments: Any) -> None:
        figures[name] = render(name, *arguments)
        task.advance(1)

    if comparison.curves:
        about = f"{len(comparison.curves)} trainings: loss and learning rate by step."
        figures["training_curves"] = render(
            "training_curves", training_curves(comparison.curves), 3.6, "Training curves", about, narrow_height=8.4
        )
    for suite in comparison.suites:
        if found := fronts(suite, comparison.price_per_hour):
            fronts_named = (f"{front.label}: {', '.join(p.model.name for p in front.best)}" for front in found)
            figures[tradeoff_chart(suite)] = render(
                tradeoff_chart(suite),
                accuracy_against(found, suite.name),
                0.8 + 3.1 * math.ceil(len(found) / 2),
                f"Accuracy on {suite.name} against what it takes",
                f"On the Pareto fronts are: {'; '.join(fronts_named)}.",
                narrow_height=0.8 + 3.1 * len(found),
            )
            task.advance(1)
        if suite.students:
            about = "; ".join(
                f"{row.student} ({short_count(row.num_parameters)}): "
                + ", ".join(f"{role} {100 * card.value:.1f}%" for role, card in row.scores.items())
                for row in suite.students
            )
            title = f"Accuracy on {suite.name} against parameters"
            add(size_chart(suite), accuracy_by_parameters(suite), CHART_INCHES, title, about)
        if suite.families:
            height = 1.5 + 0.42 * len(suite.families)
            about = (
                "One row a family: mean pass@1 of bases, of students of bare answers, of distilled ones, the teacher."
            )
            title = f"Accuracy on {suite.name} by family"
            add(family_chart(suite), accuracy_by_family(suite), height, title, about)
    return figures


def size_chart(suite: SuiteComparison) -> str:
    return f"accuracy_by_parameters-{slug(suite.name)}"


def tradeoff_chart(suite: SuiteComparison) -> str:
    return f"accuracy_against_cost-{slug(suite.name)}"


def family_chart(suite: SuiteComparison) -> str:
    return f"accuracy_by_family-{slug(suite.name)}"


def tables_csv(comparison: Comparison) -> dict[str, str]:
    """The charts' numbers, a file each: what a score takes, the training curves, every pair of models."""
    takes = [
        {"suite": suite.name, "model": row["name"], "axis": cell["label"], "amount": cell["amount"]}
        | {"pass@1": row["card"].value, "dominated_by": cell["dominated_by"] or ""}
        for suite in comparison.suites
        for row in tradeoff_rows(suite, fronts(suite, comparison.price_per_hour))
        for cell in row["cells"]
        if cell["amount"] is not None
    ]
    files = {"tradeoffs.csv": csv_text(("suite", "model", "axis", "amount", "pass@1", "dominated_by"), takes)}
    if comparison.curves:
        files["training_curves.csv"] = csv_text(("name", "step", "loss", "lr"), curve_rows(comparison.curves))
    pairs = [pair_row(suite.name, *pair) for suite in comparison.suites for pair in combinations(suite.models, 2)]
    columns = ("suite", "model", "minus", "difference", "ci95_low", "ci95_high", "p_value", "num_questions", "why_not")
    return files | {"pairs.csv": csv_text(columns, pairs)}


def markup(figure: Figure | None) -> dict[str, Any] | None:
    """Markup: it is drawn by `eval.charts`, which escapes what it says."""
    from markupsafe import Markup

    return None if figure is None else {"wide": Markup(figure.wide), "narrow": Markup(figure.narrow)}
