"""Commands of the chain: the stages that turn a teacher into students, and what publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.output import command_progress, print_push, print_report
from pipelines.cli.recipes import Overrides, RecipePath, Runs, load, naming
from pipelines.printing import say

app = typer.Typer()


@app.command("run")
def run_(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Run the whole chain: generate, distill, eval, compare."""
    run_stages("run", recipe, set_, out)


@app.command()
def generate(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Let the teacher write its traces."""
    run_stages("generate", recipe, set_, out)


@app.command()
def distill(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Verify and filter the traces, then train the students."""
    run_stages("distill", recipe, set_, out)


@app.command("eval")
def eval_(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Score teacher, bases and students."""
    run_stages("eval", recipe, set_, out)


@app.command()
def push(
    recipe: RecipePath,
    set_: Overrides = [],
    out: Runs = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be pushed, push nothing")] = False,
) -> None:
    """Push a student to the Hugging Face Hub."""
    run_stages("push", recipe, set_, out, dry_run=dry_run)


@app.command("push-traces")
def push_traces(
    recipe: RecipePath,
    set_: Overrides = [],
    out: Runs = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="lay the data set out, push nothing")] = False,
) -> None:
    """Push the traces to the Hugging Face Hub, as a data set."""
    run_stages("push-traces", recipe, set_, out, dry_run=dry_run)


def run_stages(command: str, path: Path, overrides: list[str], out: Path, *, dry_run: bool = False) -> None:
    """Run a command's stages in the folder of the recipe's run, and say what each did."""
    from pipelines import chain
    from pipelines.context import Context

    recipe = load(path, overrides)
    run_dir = out / recipe.name
    context = Context(base_dir=Path.cwd(), progress=command_progress(), dry_run=dry_run)
    with naming(path):
        stages = chain.prepare(command, recipe, run_dir, context)
        say(f"recipe {recipe.name} ({path}) in {run_dir}")
        for stage in stages:
            outcome = stage.run()
            say(f"  {'dry run: nothing is pushed' if dry_run else outcome.line()}")
            if command in ("push", "push-traces"):
                print_push(outcome.manifest.counts)
    if "compare" in chain.COMMANDS[command]:
        print_report(run_dir / "report")
