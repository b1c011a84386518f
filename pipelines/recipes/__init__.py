"""The recipes that come with potstill, one YAML file each; a recipe of one's own is named by its path."""

from __future__ import annotations

from pathlib import Path

from distill.bundled import locate
from distill.errors import RecipeError, nearest

RECIPES = Path(__file__).parent


def find_recipe(name_or_path: str | Path) -> Path:
    """A recipe's file, by its path or by its name in this folder. Raises RecipeError for a name that is not there."""
    text = str(name_or_path)
    path = locate(text, Path())
    if "/" in text or text.endswith((".yaml", ".yml")) or (path.exists() and not path.is_dir()):
        return path
    known = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
    if text in known:
        return RECIPES / f"{text}.yaml"
    raise RecipeError(f"neither a file nor one of the bundled recipes; {nearest(text, known)}", where=text)
