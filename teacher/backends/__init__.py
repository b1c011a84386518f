"""Backends of the teacher: one protocol (`distill.protocols.Teacher`), opened from the recipe's teacher section."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.recipe import NativeTeacher, OpenAITeacher

if TYPE_CHECKING:
    from distill.protocols import Teacher


def open_teacher(config: NativeTeacher | OpenAITeacher, *, base_dir: Path | None = None) -> Teacher:
    """The teacher that a recipe names. `base_dir` (default: the current directory) is where relative paths start.

    Only the chosen backend's module is imported: an endpoint needs no torch.
    """
    if isinstance(config, NativeTeacher):
        from teacher.backends.native import open_native

        return open_native((base_dir or Path.cwd()) / config.model, batch_size=config.batch_size)
    from teacher.backends.openai import OpenAICompatibleTeacher

    return OpenAICompatibleTeacher(config)
