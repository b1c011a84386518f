"""What comes with these packages - models, problem sets, templates - by the path that a recipe gives it.

In a checkout that is the path from the repository's folder (`teacher/pico`); an installed potstill has the same tree
in its own folder.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bundled(path: str) -> Path:
    """The place of something that comes with these packages."""
    return ROOT / path


def locate(path: str, base_dir: Path) -> Path:
    """A path of a recipe or a student file: from `base_dir`, else, if it is there alone, from these packages."""
    here, beside = base_dir / path, bundled(path)
    return beside if not here.exists() and beside.exists() else here
