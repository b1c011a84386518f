"""What the report's pages are made with: templates, and text of models made harmless to look at.

What models wrote is hostile until shown otherwise: the templates escape everything, control characters and direction
overrides are made visible, and the pages' own content policy allows no script and no request even if that failed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from eval.charts import short_count
from eval.compare import p_text
from eval.scored import Model

TEMPLATES = Path(__file__).parent / "templates"
SHORT_ROLES = {"teacher": "teacher", "base": "base", "direct": "bare", "distilled": "distilled"}
MAX_COLUMNS = 13  # of a table of models, so that it fits a page of ordinary width; more become another table


def template(name: str) -> Any:
    return _environment().get_template(name)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": short_count, "words": words, "duration": duration, "size": size, "p": p_text}
    return environment


def heat_tables(models: Sequence[Model], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables with a column a model, the teacher first and a group a student, none wider than a page.

    A row has a `name`, perhaps a `link`, and `values`: a share in [0, 1] or None by the model's name.
    """
    rows = list(rows)
    return [_heat_table(groups, rows) for groups in _side_by_side(models)]


def _side_by_side(models: Sequence[Model]) -> list[list[list[Model]]]:
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(model.run if model.role == "teacher" else model.student, []).append(model)
    tables: list[list[list[Model]]] = [[]]
    for group in groups.values():
        if tables[-1] and sum(map(len, tables[-1])) + len(group) > MAX_COLUMNS:
            tables.append([])
        tables[-1].append(group)
    return tables


def _heat_table(groups: Sequence[Sequence[Model]], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    heads = [
        {
            "name": group[0].run if group[0].role == "teacher" else group[0].student,
            "labels": [SHORT_ROLES[model.role] for model in group],
        }
        for group in groups
    ]
    shown = []
    for row in rows:
        cells = [
            {
                "role": model.role,
                "label": model.name,
                "percent": None if (share := row["values"].get(model.name)) is None else round(100 * share),
                "start": place == 0,
            }
            for group in groups
            for place, model in enumerate(group)
        ]
        shown.append({"name": row["name"], "link": row.get("link"), "cells": cells})
    return {"groups": heads, "rows": shown}


def visible(text: str) -> str:
    """Text that shows what it holds: control and format characters (direction overrides too) become `\\u202e`."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(map(_visible_character, text))


@lru_cache(4_096)
def _visible_character(character: str) -> str:
    harmless = character in "\n\t" or unicodedata.category(character)[0] != "C"
    return character if harmless else f"\\u{ord(character):04x}"


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
