"""The model that judges where rules do not reach, for as long as a stage needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.progress import Progress
from distill.protocols import Teacher
from distill.recipe import TeacherConfig


@contextmanager
def open_judge(
    config: TeacherConfig | None, base_dir: Path, log_dir: Path, progress: Progress
) -> Iterator[Teacher | None]:
    """The model of `config`, or None where there is none."""
    if config is None:
        yield None
        return
    from teacher.backends import open_teacher  # may bring torch in

    with progress.task("load the judge", None):
        judge: Teacher = open_teacher(config, base_dir=base_dir, log_dir=log_dir, progress=progress)
    try:
        yield judge
    finally:
        judge.close()
