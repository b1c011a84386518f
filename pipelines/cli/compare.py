"""The command that writes reports: of one run by its recipe, or of several runs by their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.chain import run_stages
from pipelines.cli.output import command_progress, print_report
from pipelines.cli.recipes import Overrides, Runs
from pipelines.printing import say

app = typer.Typer()


@app.command()
def compare(
    targets: Annotated[
        list[Path], typer.Argument(metavar="RECIPE | RUN RUN...", help="a recipe, or the folders of several runs")
    ],
    set_: Overrides = [],
    out: Runs = Path("runs"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="of several runs: where their report goes [default: OUT/RUN-and-RUN]"),
    ] = None,
) -> None:
    """Write the report that compares the sizes, of one run or of several together."""
    from distill.errors import RecipeError

    if len(targets) == 1:
        if report is not None:
            raise RecipeError("is for several runs; the report of one is in its folder", where="--report")
        run_stages("compare", targets[0], set_, out)
        return
    if set_:
        raise RecipeError("is for a recipe; these are runs", where="--set")
    from eval.traces import slug
    from pipelines.across import compare_runs
    from pipelines.context import Context

    folder = report or out / slug("-and-".join(target.resolve().name for target in targets))
    compare_runs(targets, folder, Context(base_dir=Path.cwd(), progress=command_progress()))
    say(f"{len(targets)} runs in {folder}")
    print_report(folder)
