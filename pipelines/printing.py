"""The one way in which text reaches the terminal: as it is, and never as instructions to the terminal.

Names and messages are other people's: a recipe may be called `[/x]`, a file `data[v2]`, a problem may hold the escape
sequence that clears a screen. No markup of rich's is read in any text, and what is not printable is shown escaped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import typer

UNWRAPPED = 1_000
# Control, format (among them those that turn the direction of writing), half a surrogate pair, unassigned; line ends.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""`text` in one line, with the characters that a terminal would obey, or could not write, as Python escapes them.

    >>> printable("data[v2]\x1b[2J")
    'data[v2]\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in UNPRINTABLE else one for one in text)


def say(text: str, *, err: bool = False) -> None:
    """Print a line, to standard error where `err`."""
    typer.echo(printable(text), err=err)


def say_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their headings. Wide lines stay whole where the output is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNWRAPPED)
    console.print(table)
