"""The command that grades again what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.output import command_progress, print_report
from pipelines.cli.recipes import Overrides, Runs, load, naming
from pipelines.printing import say

if TYPE_CHECKING:
    from pipelines.regrade import Regraded

app = typer.Typer()
RECIPE = "recipe.yaml"


@app.command()
def regrade(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_RECIPE", help="a run's folder, or a recipe as other commands take")
    ],
    set_: Overrides = [],
    out: Runs = Path("runs"),
) -> None:
    """Grade kept samples and traces again, without generating: scores and report follow the graders."""
    from pipelines.context import Context
    from pipelines.regrade import regrade_run

    if (run / RECIPE).is_file():
        recipe, run_dir = load(run / RECIPE, set_), run if run.name else run.resolve()  # a report is called as its run
    else:
        recipe = load(run, set_)
        run_dir = out / recipe.name
    with naming(run):
        outcome = regrade_run(recipe, run_dir, Context(base_dir=Path.cwd(), progress=command_progress()))
    graders = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    say(f"{run_dir}, graded by {graders}")
    for model in outcome.models:
        say(f"  {_line(model)}")
    if outcome.traces is not None:
        remedy = "; `potstill distill` has students learn by these" if outcome.traces.num_changed else ""
        say(f"  {_line(outcome.traces)}{remedy}")
    for left in outcome.left:
        say(f"  {left}")
    if outcome.report is not None:
        print_report(outcome.report.parent)


def _line(regraded: Regraded) -> str:
    """`mini-base: 12 of 1,600 verdicts changed; pico pass@1 7.1 -> 7.3`"""
    line = f"{regraded.name}: {regraded.num_changed:,} of {regraded.num_verdicts:,} verdicts changed"
    moves = [f"{suite} pass@1 {100 * was:.1f} -> {100 * now:.1f}" for suite, (was, now) in regraded.scores.items()]
    return "; ".join([line, *moves])
