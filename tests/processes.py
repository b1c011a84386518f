"""Processes as /proc shows them; those of strangers come and go while a test looks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def below(root: int) -> set[int]:
    """All living processes that `root` has started, at any depth; a zombie is not one."""
    parents: dict[int, int] = {}
    zombies = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            parents[int(path.parent.name)] = int(parent)
            if state == "Z":
                zombies.add(int(path.parent.name))
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root} - zombies


def children(root: int) -> set[int]:
    """Those of `below(root)` whose parent is `root` itself."""
    found = set()
    for pid in below(root):
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == root:
                found.add(pid)
    return found


def command_lines() -> Iterator[tuple[int, bytes]]:
    """Process id and command line of every process of this machine that does not end while it is read."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes()
