"""Lines on the terminal, of whatever text: as it is, without markup, and with what is not printable escaped.

Names and messages are other people's: a recipe may be called `[/x]`, a file `data[v2]`, a problem may hold the sequence
that clears a screen. Tables and bars keep to the same (`pipelines.cli.output`, `pipelines.display`).
"""

from __future__ import annotations

import typer

from distill.printable import printable


def say(text: str, *, err: bool = False) -> None:
    """Print a line, to standard error where `err`."""
    typer.echo(printable(text), err=err)
