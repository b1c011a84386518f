"""The command that reproduces a known score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.output import command_progress
from pipelines.cli.recipes import Overrides, Runs
from pipelines.printing import say

app = typer.Typer()
OUTSIDE = 1


def _names(incomplete: str) -> list[str]:
    from eval.references import references

    return [name for name in references() if name.startswith(incomplete)]


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="a score of eval/references.yaml: pico, ...", autocompletion=_names)],
    set_: Overrides = [],
    out: Runs = Path("runs"),
) -> None:
    """Score a known model by the protocol of its published score; exit code 1 where ours is outside its interval."""
    from pipelines.context import Context
    from pipelines.reproduce import reproduce as reproduced

    found, path = reproduced(name, set_, out, Context(base_dir=Path.cwd(), progress=command_progress()))
    low, high = (100 * bound for bound in found.ci95)
    say(
        f"{name}: {100 * found.value:.1f} here, {100 * found.reference:.1f} by {found.source}: "
        f"{100 * found.difference:+.1f} points (95% interval {low:+.1f} to {high:+.1f}), "
        f"{'inside' if found.inside else 'OUTSIDE'}"
    )
    say(f"kept in {path}")
    if not found.inside:
        raise typer.Exit(OUTSIDE)
