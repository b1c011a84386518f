"""The published models of the small scale, where they have been fetched: in models/, or where POTSTILL_MODELS says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

MODELS = Path(os.environ.get("POTSTILL_MODELS", REPOSITORY / "models"))


def published(name: str) -> Path:
    """The model's folder; the test is skipped where it is not there."""
    folder = MODELS / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{name} is neither in models/ nor in $POTSTILL_MODELS (potstill models fetch small)")
    return folder
