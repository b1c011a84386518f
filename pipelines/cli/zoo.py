"""Commands that show the students."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.output import print_table

app = typer.Typer(name="zoo", help="The students that potstill knows.", no_args_is_help=True)


@app.command("list")
def zoo_list() -> None:
    """List the students, smallest first; GSM8K is the base's published score in percent."""
    from rich.table import Table

    from students.zoo import list_students

    columns = ("name", "parameters", "licence", "GSM8K", "context", "base", "architecture")
    table = Table(*columns, box=None, header_style="bold")
    for student in list_students():
        score = student.published.get("gsm8k")
        table.add_row(
            student.name,
            f"{student.num_parameters:,}",
            student.licence,
            f"{score.value:.1f}" if score else "",
            f"{student.context_length:,}" if student.context_length else "",
            student.base,
            student.architecture,
        )
    print_table(table, num_droppable=len(columns) - 2)


@app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="a name of `potstill zoo list`, or a student file")]) -> None:
    """Show one student's settings as YAML."""
    import yaml

    from students.zoo import find_student

    settings = find_student(name).model_dump(mode="json", exclude_none=True)
    typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())
