"""What a score takes: accuracy against parameters, tokens, seconds, memory and money, each with its Pareto front.

A model is dominated on one axis where another is at least as accurate for no more, and better in one of the two.
Points are compared as they were measured: whether a difference in accuracy is clear is what the paired intervals say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.charts import COLOURS, GRID, INK, LABELS, MARKERS, Draw, short_count
from eval.compare import SuiteComparison
from eval.scored import Model

GIBIBYTE = 2**30
NAME_WIDTH, NAME_HEIGHT = 0.45, 0.1  # shares of an axis that a model's name takes
MIN_LOG_RATIO = 8  # of the largest to the smallest value, from which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """One model on one axis; `dominated_by` is the most accurate model that takes no more, or None."""

    model: Model
    amount: float
    accuracy: float
    dominated_by: str | None


@dataclass(frozen=True)
class Front:
    """All models of a suite on one axis, those that take least first."""

    key: str
    label: str
    points: tuple[Point, ...]

    @property
    def best(self) -> list[Point]:
        return [point for point in self.points if point.dominated_by is None]


def fronts(suite: SuiteComparison, price_per_hour: float | None = None) -> list[Front]:
    """The axes on which two models or more are known; money only where an hour has a price."""

    def seconds(model: Model) -> float | None:
        asked = model.manifest.counts.get("asked") if model.manifest else None
        return model.manifest.seconds / asked if model.manifest and asked else None

    def money(model: Model) -> float | None:
        spent = seconds(model)
        return None if spent is None or price_per_hour is None else 1_000 * spent * price_per_hour / 3_600

    axes: list[tuple[str, str, Callable[[Model], float | None]]] = [
        ("parameters", "parameters", lambda model: model.num_parameters or None),
        ("tokens", "tokens an answer", lambda model: model.answers[suite.name].mean_tokens),
        ("seconds", "seconds an answer, as scored", seconds),
        ("memory", "peak host memory, GiB", lambda m: m.manifest.peak_rss_bytes / GIBIBYTE if m.manifest else None),
        ("cost", "cost of 1,000 answers", money),
    ]
    found = []
    for key, label, amount in axes:
        known = [(model, value) for model in suite.models if (value := amount(model)) is not None]
        if len(known) > 1:
            found.append(Front(key, label, _points(known, suite.name)))
    return found


def _points(known: Sequence[tuple[Model, float]], suite: str) -> tuple[Point, ...]:
    scored = [(model, amount, card.value) for model, amount in known if (card := model.card(suite))]

    def dominating(amount: float, accuracy: float) -> str | None:
        better = [
            (right, -takes, model.name)
            for model, takes, right in scored
            if takes <= amount and right >= accuracy and (takes < amount or right > accuracy)
        ]
        return max(better)[2] if better else None

    points = [Point(model, amount, right, dominating(amount, right)) for model, amount, right in scored]
    return tuple(sorted(points, key=lambda point: (point.amount, -point.accuracy)))


def accuracy_against(found: Sequence[Front], suite: str) -> Draw:
    """A panel an axis: filled and named is what is on the front, faint is what is dominated."""

    def draw(figure: Any, narrow: bool) -> None:
        columns = 1 if narrow else 2
        rows = math.ceil(len(found) / columns)
        for number, front in enumerate(found, start=1):
            _panel(figure.add_subplot(rows, columns, number), front, suite)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2 if narrow else 4)

    return draw


def _panel(axes: Any, front: Front, suite: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    amounts = [point.amount for point in front.points]
    least, most = min(amounts), max(amounts)
    logarithmic = least > 0 and most / least >= MIN_LOG_RATIO
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_amount(value)))
    best = front.best
    axes.plot(
        [p.amount for p in best],
        [100 * p.accuracy for p in best],
        color=INK,
        linewidth=1.2,
        drawstyle="steps-post",
        zorder=2,
    )
    for role, label in LABELS.items():
        of_role = [point for point in front.points if point.model.role == role]
        for dominated in (False, True):
            points = [point for point in of_role if (point.dominated_by is not None) == dominated]
            if points:
                axes.scatter(
                    [point.amount for point in points],
                    [100 * point.accuracy for point in points],
                    s=54,
                    color=COLOURS[role],
                    marker=MARKERS[role],
                    alpha=0.3 if dominated else 1.0,
                    label=None if dominated and len(points) < len(of_role) else label,
                    zorder=3,
                )
    named: list[tuple[float, float]] = []
    for point in sorted(best, key=lambda point: -point.accuracy):
        place = _place(point.amount, least, most, logarithmic=logarithmic)
        near = any(abs(point.accuracy - of) < NAME_HEIGHT and abs(place - at) < NAME_WIDTH for at, of in named)
        if point.model.role not in ("distilled", "teacher") or near:
            continue  # the table names them all
        named.append((place, point.accuracy))
        axes.annotate(
            point.model.name,
            (point.amount, 100 * point.accuracy),
            xytext=(-7, 5) if place > NAME_WIDTH else (0, 7),
            horizontalalignment="right" if place > NAME_WIDTH else "left",
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axes.margins(x=0.1)
    axes.set_ylim(-8, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_xlabel(front.label)
    axes.set_ylabel(f"pass@1 on {suite}, %")
    axes.grid(axis="x", color=GRID, alpha=0.5)


def _place(amount: float, least: float, most: float, *, logarithmic: bool) -> float:
    if most == least:
        return 0.0
    if logarithmic:
        return math.log(amount / least) / math.log(most / least)
    return (amount - least) / (most - least)


def short_amount(value: float) -> str:
    """`1.5B`, `340`, `0.03`."""
    return short_count(value) if value >= 1_000 else f"{value:.3g}"


def tradeoff_rows(suite: SuiteComparison, found: Sequence[Front]) -> list[Mapping[str, Any]]:
    """A row a model: what it takes on each axis, and which model dominates it there."""
    rows = []
    for model in suite.models:
        of_model = {front.key: next((p for p in front.points if p.model is model), None) for front in found}
        cells = [
            {
                "key": front.key,
                "label": front.label,
                "amount": None if (point := of_model[front.key]) is None else point.amount,
                "shown": "–" if point is None else short_amount(point.amount),
                "dominated_by": None if point is None else point.dominated_by,
                "best": point is not None and point.dominated_by is None,
            }
            for front in found
        ]
        rows.append({"name": model.name, "role": model.role, "card": model.card(suite.name), "cells": cells})
    return rows
