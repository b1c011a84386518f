"""The command that checks machine and recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.output import command_progress, print_findings
from pipelines.cli.recipes import Overrides, Runs

app = typer.Typer()


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="also check this recipe")] = None,
    set_: Overrides = [],
    out: Runs = Path("runs"),
) -> None:
    """Check this machine, and a recipe if one is given, before anything runs."""
    from pipelines.doctor import examine_machine, examine_recipe
    from pipelines.recipes import find_recipe

    here = Path.cwd()
    findings = examine_machine(here)
    if recipe is not None:
        findings += examine_recipe(find_recipe(recipe), set_, here, out, command_progress())
    print_findings(findings)
    raise typer.Exit(max(finding.exit_code for finding in findings))
