"""The folder of a run: whether it can be written, seen before any work is done, and one command at a time in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import DataError, EnvironmentFault
from distill.file_lock import check_lock, take_lock
from distill.manifest import environment_faults

LOCK = ".lock"
PROBE = b"\0" * (1 << 20)  # what a disk that is full or over quota does not take any more


def check_writable(folder: Path) -> None:
    """Raise unless files can be made in `folder`, or in what is there of the way to it. Leaves nothing behind.

    Raises DataError where the way leads through a file, EnvironmentFault for a lack of permission, a file system that
    is read-only, a disk that is full.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise DataError("is not a folder: nothing can be written there", where=there)
    try:
        with environment_faults(folder), tempfile.TemporaryFile(dir=there) as file:
            file.write(PROBE)
            file.flush()
    except OSError as exc:
        raise EnvironmentFault(f"cannot be written ({exc.strerror})", where=folder) from exc


def check_run_folder(run_dir: Path, folders: Iterable[Path]) -> None:
    """Raise as `check_writable` does, for the run's folder, `folders` in it and the folders in these.

    Raises DataError where another command holds the run.
    """
    for folder in (run_dir, *folders):
        check_writable(folder)
        for inner in folder.glob("*/") if folder.is_dir() else ():
            check_writable(inner)
    check_lock(run_dir / LOCK, of=run_dir)


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other commands out of the run's folder, which is made where there is none.

    Raises DataError where one is in it, EnvironmentFault where it cannot be made.
    """
    with environment_faults(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = take_lock(run_dir / LOCK, of=run_dir, signed=False)  # a run that is up to date changes nothing
    try:
        yield
    finally:
        os.close(lock)
