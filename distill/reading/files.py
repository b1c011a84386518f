"""Regular files alone are opened: a pipe waits for ever, a device has no end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from distill.errors import UserInputError

# Recipes, zoo files, jobs and configs have kilobytes; the largest tokenizers' settings a few megabytes.
SETTINGS_BYTES = 16 << 20

Fault = type[UserInputError]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path, fault: Fault) -> BinaryIO:
    """Open a regular file. Raises `fault` for one that is missing, unreadable, or of another kind."""
    try:
        # Without O_NONBLOCK opening a pipe waits for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise fault(f"cannot be read ({_reason(exc)})", where=path) from exc
    kind = kind_of(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise fault(f"cannot be read (it is {kind})", where=path)
    return os.fdopen(descriptor, "rb")


def kind_of(mode: int) -> str | None:
    """What a file is by its `st_mode`; None for a regular one."""
    return next((name for test, name in _KINDS if test(mode)), None)


def read_text(path: Path, fault: Fault, *, max_bytes: int = SETTINGS_BYTES) -> str:
    """The text of a small file: UTF-8, a byte order mark dropped. Raises `fault`."""
    with open_file(path, fault) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise fault(f"cannot be read (it has more than {max_bytes >> 20} MiB)", where=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise fault(f"cannot be read (not UTF-8: {exc.reason} at byte {exc.start})", where=path) from exc


def _reason(exc: OSError | ValueError) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
