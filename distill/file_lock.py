"""Locks on files: who writes holds one, and it falls with the process that holds it, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from distill.errors import DataError


def take_lock(path: Path, *, of: Path, signed: bool = True) -> int:
    """Lock the file `path`, made where there is none, and return the descriptor whose closing gives the lock back.

    `signed` writes this process's number into it; else a file that is there stays as it was, to its times. Raises
    DataError, naming `of`, where another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(descriptor, of)
        if signed:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_lock(path: Path, *, of: Path) -> None:
    """Raise DataError, naming `of`, where a process holds the lock on `path`. Changes nothing."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, of)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, of: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        raise DataError(
            "is being written by another process" + (f" (pid {holder})" if holder else ""), where=of
        ) from exc
