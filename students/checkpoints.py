"""Training checkpoints that are whole, and a finished model that appears at once.

A trainer killed while it saves leaves a folder that looks like the newest checkpoint. Here a checkpoint counts only
with its `complete.json`, written last, in which every file stands with its size. The finished model is built beside
its place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from distill.failpoints import failpoint
from distill.manifest import sync_folder, write_atomically

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of a checkpoint folder to the disk, then write its mark."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_atomically(checkpoint / COMPLETE, json.dumps(sizes, indent=2) + "\n")
    failpoint("checkpoint.complete")


def is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    return max(filter(is_complete, _checkpoints(folder)), key=_step, default=None)


def drop_incomplete(folder: Path) -> None:
    """Remove what an interrupted save left, so that it is never counted among the checkpoints that are kept."""
    for checkpoint in _checkpoints(folder):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)


def move_into_place(built: Path, out_dir: Path) -> None:
    """Rename a finished folder to `out_dir`; an older result there is moved out of the way first and then removed."""
    for path in built.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    old = built.with_name("old")
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        out_dir.rename(old)
    built.rename(out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
