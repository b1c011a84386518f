"""Commands that train from nothing: a teacher over GPUs, and the bundled models again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from distill.bundled import locate
from distill.errors import UserInputError
from pipelines.cli.output import command_progress
from pipelines.cli.recipes import Overrides
from pipelines.printing import say

app = typer.Typer()
pico = typer.Typer(
    name="pico", help="Make the bundled pico models again (needs a GPU to be quick).", no_args_is_help=True
)


@pico.command("teacher")
def pico_teacher(out: Annotated[Path, typer.Option("--out", metavar="FOLDER")] = Path("teacher/pico")) -> None:
    """Train the pico teacher by teacher/train/pico.yaml."""
    from pipelines.run_folder import check_writable
    from teacher.train.make import load_pretrain_config, make_teacher

    check_writable(out)
    workers = os.cpu_count() or 1
    folder = make_teacher(load_pretrain_config(), out, num_workers=workers, progress=command_progress())
    say(f"wrote {folder}")


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file, such as teacher/train/pico.yaml")],
    set_: Overrides = [],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="the model folder")] = Path("teacher-trained"),
    held_out: Annotated[int, typer.Option(min=1, help="problems a family for the card's accuracy")] = 64,
) -> None:
    """Train a teacher over the recipe's layout, one process a rank: torchrun --no-python potstill pretrain ..."""
    from distill.progress import silent
    from pipelines.run_folder import check_writable
    from teacher.train.make import Launch, load_pretrain_config, make_teacher

    recipe = locate(str(recipe), Path())
    rank, num_ranks, local_rank, num_local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    init_method = "env://" if "WORLD_SIZE" in os.environ else "tcp://127.0.0.1:0"
    try:
        check_writable(out)
        folder = make_teacher(
            load_pretrain_config(recipe, set_), out, launch=Launch(rank, num_ranks, local_rank, init_method, recipe),
            num_workers=max(1, (os.cpu_count() or 1) // num_local), held_out_per_family=held_out,
            progress=silent() if rank else command_progress(),
        )  # fmt: skip
    except UserInputError as exc:
        if rank == 0:
            raise
        raise typer.Exit(exc.exit_code) from exc  # one rank says what all of them found
    if rank == 0:
        say(f"wrote {folder}")


@pico.command("bases")
def pico_bases(
    names: Annotated[list[str] | None, typer.Argument(help="which; none: all")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER")] = Path("students/pico"),
) -> None:
    """Pre-train the pico bases by students/pretrain/pico.yaml, side by side on one device."""
    from pipelines.run_folder import check_writable
    from students.pretrain.bases import load_bases_config, make_bases

    check_writable(out)
    for folder in make_bases(load_bases_config(), out, names=names or None, num_workers=4, progress=command_progress()):
        say(f"wrote {folder}")
