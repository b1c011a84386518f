"""The way of text to the terminal: as it is, and never as instructions to the terminal.

Names and messages are other people's: a recipe may be called `[/x]`, a file `data[v2]`, a problem may hold the escape
sequence that clears a screen. Whatever shows such text has rich read no markup in it (`pipelines.cli.output`,
`pipelines.display`), and shows what is not printable escaped.
"""

from __future__ import annotations

import unicodedata

import typer

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
