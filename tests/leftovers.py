"""Processes that a test run has started and that are still there: its children, and theirs that lost their parent.

A process knows its run by its environment, which it hands on to those that it starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

RUN = "POTSTILL_TEST_RUN"
# They end with the process that started them, and live as long.
SERVANTS = (
    *("multiprocessing.resource_tracker", "multiprocessing.forkserver"),
    "torch/_inductor/compile_worker",
    "chat_templates/worker.py",
)
# A process that was told to end may take a moment.
GRACE_S = 5.0


class Leftovers:
    """`mark` before any test starts a process, `look` after each test, `end` behind the last."""

    def __init__(self) -> None:
        self._started_in: dict[int, str] = {}

    def mark(self) -> None:
        os.environ[RUN] = str(os.getpid())

    def look(self, test: str) -> None:
        for pid in _children():
            self._started_in.setdefault(pid, test)

    def end(self) -> list[str]:
        """Kill what is left after a moment; each as one line that names the test that started it."""
        until = time.monotonic() + GRACE_S
        while (left := _left()) and time.monotonic() < until:
            time.sleep(0.05)
        lines = [f"{pid} of {self._test_of(pid)}: {_command(pid)}" for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return lines

    def _test_of(self, pid: int) -> str:
        said = _environment(pid).get("PYTEST_CURRENT_TEST", "a test that is not known")
        return self._started_in.get(pid, said)


def _left() -> list[int]:
    ours = {pid for pid in _processes() if _environment(pid).get(RUN) == str(os.getpid())} | set(_children())
    return sorted(pid for pid in ours - {os.getpid()} if _is_alive(pid) and not _is_servant(pid))


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _children() -> list[int]:
    """Direct children, whichever thread started them."""
    lists = (_read(task / "children") for task in Path("/proc/self/task").iterdir())
    return [int(pid) for listed in lists for pid in listed.split()]


def _environment(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _read(Path(f"/proc/{pid}/environ")).split("\0"))
    return {name: value for name, _, value in pairs}


def _command(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


def _is_servant(pid: int) -> bool:
    return any(servant in _command(pid) for servant in SERVANTS)


def _is_alive(pid: int) -> bool:
    """A zombie has ended: whoever started it has not asked yet."""
    state = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""
