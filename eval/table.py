"""Tables as files beside the page: CSV that a spreadsheet reads as text and never as a formula, and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.page import visible

# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """One header and the rows. Numbers stay numbers; text is made harmless as `csv_cell` says."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """A text as a cell: control and direction characters visible, an apostrophe before what begins like a formula."""
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.lstrip(" \n").startswith(FORMULA_STARTS) else shown


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_cell, cells))} |"


def markdown_cell(text: str) -> str:
    """Text of one table cell: no line break, no control character, and no mark of Markdown or HTML that is read so."""
    line = visible(" ".join(text.split()))
    return "".join(f"\\{mark}" if mark in "\\|*_`<>[]!&#~$" else mark for mark in line)
