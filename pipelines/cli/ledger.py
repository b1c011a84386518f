"""Commands over ledgers of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.output import command_progress
from pipelines.printing import say

app = typer.Typer(name="ledger", help="Ledgers of samples.", no_args_is_help=True)


@app.command("merge")
def ledger_merge(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the ledger to merge into; made where it is not there")],
    sources: Annotated[list[Path], typer.Argument(metavar="IN...", help="ledgers of other machines; they stay")],
) -> None:
    """Merge ledgers by key: the result is the same in whatever order, and however often, it is done."""
    from distill.ledger_merge import merge_ledgers

    counts = merge_ledgers(target, sources, command_progress())
    say(f"{target}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
