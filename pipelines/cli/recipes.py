"""The recipe of a command: how it is given, opened, and named in a fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.errors import RecipeError

if TYPE_CHECKING:
    from distill.recipe import Recipe

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="recipe file, or a bundled one's name: pico, small, r1-openai, ...")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=VALUE", help="override one field of the recipe; may be repeated")
]
Runs = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="where runs are kept")]


def load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file, or of a bundled one's name, with its overrides. Raises RecipeError."""
    from distill.recipe import load_recipe
    from pipelines.recipes import find_recipe

    return load_recipe(find_recipe(path), overrides)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Rooms that see a part of the recipe call it `recipe`; here its file is known."""
    try:
        yield
    except RecipeError as exc:
        if exc.where != "recipe":
            raise
        prefix = ": ".join(part for part in ("recipe", exc.field) if part) + ": "
        raise RecipeError(str(exc).removeprefix(prefix), where=path, field=exc.field) from exc
