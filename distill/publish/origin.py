"""Names of models for cards: those under which they are published, and never a path of the machine that trained.

A folder of the Hub's cache says whose it is, and so does a name that is no folder. `_name_or_path` in a config.json is
what its model was made from, and often somebody's own path: it is quoted where it may be a repository, no more.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MADE_HERE = ("pretrain.json", "training.json", "train_log.json")  # logs that potstill leaves in a model's folder
UNNAMED = "a local checkpoint"


def repository_of(model: str, folder: Path) -> str | None:
    """The repository `owner/name` that `model` is, whose `folder` need not be there; None where that is not known."""
    if not folder.is_dir():
        return model if REPOSITORY.fullmatch(model) else None
    cached = next((part for part in folder.parts if part.startswith("models--")), "")
    owner, _, name = cached.removeprefix("models--").partition("--")
    return f"{owner}/{name}" if owner and name else None


def published_name(model: str, folder: Path) -> str:
    """The model as prose names it, in Markdown: its repository, its name if potstill made it, else what is known."""
    if (repository := repository_of(model, folder)) is not None:
        return f"`{repository}`"
    if any((folder / log).is_file() for log in MADE_HERE):
        return f"potstill's `{folder.resolve().name}`"
    if not folder.is_dir() and "/" not in model and "\\" not in model:
        return f"`{model}`"  # what an endpoint calls it
    source = _made_from(folder)
    return UNNAMED if source is None else f"{UNNAMED}, made from `{source}` by its config.json"


def _made_from(folder: Path) -> str | None:
    try:
        source = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return source if isinstance(source, str) and REPOSITORY.fullmatch(source) else None
