"""Commands that show the students."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.output import print_table

app = typer.Typer(name="zoo", help="The students that potstill knows.", no_args_is_help=True)


@app.command("list")
def zoo_list() -> None:
    """List the students, smallest first."""
    from rich.table import Table

    from students.zoo import list_students

    table = Table("name", "base", "architecture", "parameters", "licence", box=None, header_style="bold")
    for student in list_students():
        count = f"{student.num_parameters:,}"
        table.add_row(student.name, student.base, student.architecture, count, student.licence)
    print_table(table)


@app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="a name of `potstill zoo list`, or a student file")]) -> None:
    """Show one student's settings as YAML."""
    import yaml

    from students.zoo import find_student

    settings = find_student(name).model_dump(mode="json")
    typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())
