"""What commands show: progress, tables, the headline of a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.printable import printable
from pipelines.printing import say

if TYPE_CHECKING:
    from rich.table import Table

    from distill.findings import Finding
    from distill.progress import Progress

UNWRAPPED = 1_000


def command_progress() -> Progress:
    """Bars on a terminal, plain lines elsewhere, both on standard error."""
    from rich.console import Console

    from distill.plain_progress import PlainProgress
    from pipelines.display import BarProgress

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal else PlainProgress(sys.stderr)


def print_push(counts: dict[str, Any]) -> None:
    """Print where the model or the data set goes and of which files it consists."""
    from rich.table import Table

    if "folder" in counts:
        say(f"laid out in {counts['folder']}")
    say(f"{counts['repo']} ({'private' if counts['private'] else 'public'}) {counts.get('url', '')}".rstrip())
    table = Table("file", "bytes", box=None, header_style="bold")
    for name, size in counts["tree"].items():
        table.add_row(printable(name), f"{size:,}")
    print_table(table)


def print_report(folder: Path) -> None:
    """The headline of a report: every model's score on whole suites, the best student, and where to read more."""
    import json

    from rich.table import Table

    table = Table("model", "role", "parameters", "suite", "score", box=None, header_style="bold")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for model in summary["models"]:
        score = f"{100 * model['value']:.1f} ± {100 * model['stderr']:.1f}"
        count = f"{model['num_parameters']:,}"
        table.add_row(printable(model["name"]), model["role"], count, f"{model['suite']} {model['metric']}", score)
    print_table(table)
    if best := summary["best"]:
        say(f"best student: {best['student']}, by the {best['rule']}")
    say(f"report: {folder / 'index.html'}")


def print_table(table: Table, *, num_droppable: int = 0) -> None:
    """Print a table without cutting a word of it; cells are shown as they are: no markup is read.

    Lines stay whole where the output is not a terminal. In a terminal that is too narrow, up to `num_droppable` columns
    are left out from the right; what is still too wide is folded.
    """
    from rich.console import Console
    from rich.measure import Measurement

    plainly = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plainly)
    if not console.is_terminal:
        console = Console(width=UNWRAPPED, **plainly)
    whole = console.options.update(max_width=UNWRAPPED)
    while num_droppable and Measurement.get(console, whole, table).maximum > console.width:
        table.columns.pop()
        num_droppable -= 1
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def print_findings(findings: list[Finding]) -> None:
    """One row a check of doctor."""
    from rich.table import Table

    table = Table("", "check", "found", box=None, header_style="bold")
    for finding in findings:
        table.add_row(finding.state, printable(finding.check), printable(finding.text))
    print_table(table)
