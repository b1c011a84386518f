"""Hashes of large files, kept between commands: a checkpoint of 671 GB is read once, not once a stage and a command.

    $POTSTILL_CACHE/hashes/<hash of the file's path>.json       default folder: ~/.cache/potstill

An entry is believed only where the file's device, inode, size, and times of modification and of change in nanoseconds
are those that it was made with, and where the entry agrees with a hash of itself; anything else counts as no entry.
Programs can set back a file's time of modification but not its time of change, so a file that was written to is read
again. A file that changed within `SETTLED_NS` before it was read is not entered: another write in the same tick of the
file system's clock would leave no trace. What no entry can show is a disk that returns other bytes than were written.
A cache folder that cannot be read or written costs time alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "POTSTILL_CACHE"
# Smaller files are always read: below this size a look at the file costs about as much as an entry is worth.
LEAST_BYTES = 64 * 2**20
SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "potstill")


class HashCache:
    """Hashes of files, as entries in `folder`."""

    def __init__(self, folder: Path, *, settled_ns: int = SETTLED_NS) -> None:
        self._folder = folder
        self._settled_ns = settled_ns

    def digest(self, path: Path, read: Callable[[Path], str]) -> str:
        """The hash of `path`: the entry's if there is one to believe, else what `read` makes of the file."""
        state = _state(path)
        entry = self._folder / f"{_sha256(state[0])}.json"
        known = _load(entry, state)
        if known is not None:
            return known
        started = time.time_ns()
        digest = read(path)
        if _state(path) == state and max(state[-2:]) < started - self._settled_ns:
            _store(entry, state, digest)
        return digest


State = tuple[str, int, int, int, int, int]


def _state(path: Path) -> State:
    stat = path.stat()
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _seal(state: State, digest: str) -> str:
    return _sha256(json.dumps([*state, digest]))


def _load(entry: Path, state: State) -> str | None:
    try:
        content = json.loads(entry.read_bytes())
        digest, seal = content["sha256"], content["seal"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return digest if isinstance(digest, str) and seal == _seal(state, digest) else None


def _store(entry: Path, state: State, digest: str) -> None:
    """Replace the entry; without fsync, since a torn one does not agree with its seal."""
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"file": state[0], "sha256": digest, "seal": _seal(state, digest)}))
        temporary.replace(entry)
    except OSError:
        return
