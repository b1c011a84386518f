"""The context of a stage, besides its recipe and its run's folder: where paths start, who is shown progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distill.progress import Progress, silent
from distill.protocols import Teacher
from distill.recipe import TeacherConfig

OpenTeacher = Callable[[TeacherConfig], Teacher]


@dataclass(frozen=True)
class Context:
    """Settings of one command that change no result, and the seams at which tests stand in for what is slow.

    `base_dir` is where the recipe's relative paths start: the command line says it once. `dry_run` has a push show what
    it would do. `num_workers` bounds the models that are scored side by side (None: as many as the machine has room
    for), `gpus` are those that they share (None: all that this process sees). `open_teacher` opens the teacher that
    writes the traces (None: the backend that the recipe names).
    """

    base_dir: Path
    progress: Progress = field(default_factory=silent)
    dry_run: bool = False
    num_workers: int | None = None
    gpus: tuple[str, ...] | None = None
    open_teacher: OpenTeacher | None = None
