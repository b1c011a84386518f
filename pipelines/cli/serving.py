"""Commands that start what goes on: a server, a job over machines."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from distill.bundled import locate
from distill.errors import RecipeError
from pipelines.cli.output import command_progress
from pipelines.cli.recipes import Overrides, load, naming
from pipelines.ports import SERVE_PORT
from pipelines.printing import say

if TYPE_CHECKING:
    from distill.recipe import TeacherConfig
    from distill.records import Sampling

app = typer.Typer()


@app.command()
def serve(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file, or a model's folder or GGUF file")],
    set_: Overrides = [],
    host: Annotated[str, typer.Option(help="address to bind; others need $POTSTILL_API_KEY")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one")] = SERVE_PORT,
    max_waiting: Annotated[
        int | None, typer.Option(min=1, help="samples that may wait at a native server; more are refused with 429")
    ] = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="a native teacher drafts a token a step with its MTP layer; same texts")
    ] = False,
    reasoning_parser: Annotated[
        str | None, typer.Option(metavar="NAME", help="deepseek_r1: a native server's answers have reasoning_content")
    ] = None,
    end_loops: Annotated[bool, typer.Option("--end-loops", help="a native server ends texts that loop")] = False,
    node_rank: Annotated[int, typer.Option(min=0, help="which node this one is; others than 0 have ranks alone")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print every node's vLLM command, start nothing")] = False,
) -> None:
    """Serve the recipe's teacher, or the model in a folder or GGUF file, over an OpenAI-compatible HTTP API."""
    from pipelines.serving import ServerSettings, launch_plan, serve_teacher

    with naming(recipe):
        if dry_run:
            for command in launch_plan(load(recipe, set_), host=host, port=port):
                typer.echo(command)
        else:
            serve_teacher(
                *_served_teacher(recipe, set_),
                ServerSettings(max_waiting, speculate, reasoning_parser, end_loops),
                host=host,
                port=port,
                base_dir=Path.cwd(),
                announce=say,
                node_rank=node_rank,
                progress=command_progress(),
            )
            _end_at_once()


@app.command()
def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="job file: launcher, nodes, command (docs/launch.md)")],
    set_: Overrides = [],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="where to write what is rendered")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="render and check, start nothing")] = False,
) -> None:
    """Start a job on one machine, a Slurm or Ray cluster, or a cloud."""
    from pipelines.launch.start import start

    show = partial(typer.echo, nl=False)  # a script stays as it is, to the letter
    raise typer.Exit(start(job, set_, out=out, dry_run=dry_run, announce=say, show=show))


def _end_at_once() -> NoReturn:
    """End the process as it is: all is closed, and to take the interpreter apart, with torch and transformers in it,
    would cost more than a second."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _served_teacher(path: Path, overrides: list[str]) -> tuple[TeacherConfig, Sampling]:
    """The teacher to serve, and the sampling of requests that leave it open."""
    from distill.gguf import is_gguf
    from distill.recipe import NativeTeacher
    from distill.records import Sampling as Settings

    if not (locate(str(path), Path()).is_dir() or is_gguf(path)):
        recipe = load(path, overrides)
        return recipe.teacher, recipe.generate.sampling
    if overrides:
        raise RecipeError("overrides a field of a recipe; a model has none", where="--set")
    return NativeTeacher(model=str(path)), Settings()
