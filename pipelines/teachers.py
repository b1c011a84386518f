"""Teachers as stages open them: the backend that a recipe names, and the folder that it reads."""

from __future__ import annotations

from pathlib import Path

from distill.bundled import locate
from distill.errors import CheckpointError
from distill.gguf import checkpoint_folder
from distill.protocols import Teacher
from distill.recipe import NativeTeacher, TeacherConfig, VllmServing
from pipelines.context import Context, OpenTeacher


def teacher_opener(context: Context, log_dir: Path) -> OpenTeacher:
    """What opens a teacher; a server that is started keeps its log in `log_dir`."""
    if context.open_teacher is not None:
        return context.open_teacher
    from teacher.backends import open_teacher  # may bring torch in

    def open_backend(config: TeacherConfig) -> Teacher:
        base_dir, progress = context.base_dir, context.progress
        with progress.task("load the teacher", None):
            teacher: Teacher = open_teacher(config, base_dir=base_dir, log_dir=log_dir, progress=progress)
        return teacher

    return open_backend


def teacher_folder(config: TeacherConfig, base_dir: Path) -> Path | None:
    """The folder on this machine whose weights the teacher has; None for one of an endpoint or of the Hub.

    Raises CheckpointError for a native teacher's that is not there.
    """
    if isinstance(config, NativeTeacher):
        path = locate(config.model, base_dir)
        folder = checkpoint_folder(path)
        if not folder.is_dir():
            raise CheckpointError("no such checkpoint folder", where=path, field="teacher.model")
        return folder
    if isinstance(config, VllmServing) and (model := locate(config.model, base_dir)).exists():
        return model
    return None
