"""The program that proves a sandbox: it tries what must not work, and prints what did. Runs inside, as source text."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

UNSHARE = {"x86_64": 272, "aarch64": 97}
ESCAPED = "-escaped"  # behind the planted file's name: a file that the probe must not be able to make
CLONE_NEWUSER = 0x10000000
OTHER = '{"worked": ["become another program"], "threads": 0, "environment": []}'


def attempts(planted: str) -> dict[str, Callable[[], object]]:
    """Things to try by name: each raises where the sandbox holds."""
    libc = ctypes.CDLL(None, use_errno=True)

    def system_call(*words: int) -> None:
        if libc.syscall(*map(ctypes.c_long, words)) < 0:
            raise OSError(ctypes.get_errno(), "refused")

    def connect() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
            stream.settimeout(1)
            stream.connect(("127.0.0.1", 9))

    return {
        "open a TCP socket": connect,
        "open a UDP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "open an IPv6 socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
        "open a Unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        "read a file outside": lambda: open(planted, "rb").read(),
        "read /etc/shadow": lambda: open("/etc/shadow", "rb").read(),
        "read /proc/self/environ": lambda: open("/proc/self/environ", "rb").read(),
        "list /root": lambda: os.listdir("/root/.ssh"),
        "write outside": lambda: open(planted + ESCAPED, "wb"),
        "write here": lambda: open(os.path.basename(planted) + ESCAPED, "wb"),
        "fork": lambda: os.fork() or os._exit(0),
        "start a program": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        "make a name space": lambda: system_call(UNSHARE[os.uname().machine], CLONE_NEWUSER),
        "signal the parent": lambda: os.kill(os.getppid() or 1, 0),
        "be root": lambda: os.setuid(0) if os.getuid() else None,
        # The last one: where it works, it is the other program that reports.
        "become another program": lambda: os.execv(sys.executable, [sys.executable, "-c", f"print({OTHER!r})"]),
    }


def started_threads(most: int) -> int:
    """Start up to `most` threads and tell how many could be started; they end when they are let go."""
    gate = threading.Event()
    started = []
    try:
        for _ in range(most):
            thread = threading.Thread(target=gate.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    gate.set()
    for thread in started:
        thread.join()
    return len(started)


def report(planted: str, num_threads: int) -> dict[str, object]:
    worked = []
    for name, attempt in attempts(planted).items():
        try:
            attempt()
        except (OSError, subprocess.SubprocessError):
            continue
        worked.append(name)
    return {
        "worked": worked,
        "threads": started_threads(4 * num_threads),
        "environment": sorted(os.environ),
    }
