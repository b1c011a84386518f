"""Keeps one server: runs it in a session of its own and ends it, with all that it started, when its owner is gone.

    python keeper.py OWNER_PID GRACE_S COMMAND...        standard input: a pipe that the owner holds open

The owner may die in any way, SIGKILL included: then the pipe ends or the parent's id changes. The server's processes
may have left its group: the keeper is their subreaper, so whatever they start stays below it and is found. Should the
keeper itself be killed, the kernel sends SIGTERM to the server. Ends with the server's exit status (128 + signal).

Run by its path with the standard library alone, so that it costs ten megabytes beside the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2


def main(arguments: list[str]) -> int:
    owner, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    keeper = os.getpid()
    server = os.fork()
    if server == 0:
        _become(command, libc, keeper)
    status = None
    while status is None and not told and os.getppid() == owner and not _pipe_ended():
        status = _reap(server)
    ended = _end_all(server, grace_s)
    status = ended if status is None else status
    return 128 + signal.SIGTERM if status is None else status


def _become(command: list[str], libc: ctypes.CDLL, keeper: int) -> None:
    """In the child: turn into the server. Never returns."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == keeper:  # else it died before the line above
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.execvp(command[0], command)
    except OSError as exc:
        os.write(2, f"keeper: {command[0]}: {exc.strerror}\n".encode())
    finally:
        os._exit(127)


def _pipe_ended() -> bool:
    """True once the owner has closed its end; waits for `POLL_S`. Nothing is ever written into the pipe."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return bool(readable) and os.read(0, 1) == b""


def _reap(server: int) -> int | None:
    """Collect what has ended; the server's exit status once it has."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, word = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == server:
                code = os.waitstatus_to_exitcode(word)
                status = code if code >= 0 else 128 - code
    return status


def _end_all(server: int, grace_s: float) -> int | None:
    """SIGTERM to the server's group; SIGKILL to whatever is left after `grace_s`."""
    status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left := _descendants():
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        ended = _reap(server)
        status = status if ended is None else ended
    return status


def _descendants() -> list[int]:
    """Every living process below this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name) state parent ...; the name may hold spaces and parentheses
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    below = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    return sorted(below - {os.getpid()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
