"""The pool's side of one worker: the pipes to a keeper (`distill.verify.worker`) and what it is at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

Task = dict[str, Any]

START_S = 120.0  # for imports and for data sets that take their time to be made; never counted to an answer
END_S = 10.0  # for a killed grader to be gone
ROOT = Path(__file__).parents[len(__package__.split("."))]


class Keeper:
    """One keeper and the chunk that its grader works on: `chunk` holds the answers that have no verdict yet."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in kill
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", repr(timeout_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.into, self.out = self._process.stdin, self._process.stdout
        os.set_blocking(self.into.fileno(), False)
        self._rest = b""
        self._unsent = b""
        self._said_before = 0
        self.proved = False  # has it ever had a grader ready?
        self.ready = False
        self.busy = False  # has a grader, or is about to
        self.chunk: deque[int] = deque()
        self.deadline = float("inf")
        self.resting_until = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_more_to_send(self) -> bool:
        return bool(self._unsent)

    def give(self, chunk: Sequence[int], tasks: Sequence[Task]) -> None:
        self.chunk = deque(chunk)
        self.ready, self.busy = False, True
        self.deadline = time.monotonic() + START_S
        self._said_before = os.fstat(self._stderr.fileno()).st_size
        self._say([tasks[index] for index in chunk])

    def abandon(self) -> list[int]:
        """Have the grader killed. What it had not graded is returned; its end is still to come."""
        left = list(self.chunk)
        self.chunk.clear()
        self.deadline = time.monotonic() + END_S
        self._say("kill")
        return left

    def send(self) -> None:
        """Write what the pipe takes. A broken one is found out by reading."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                self._unsent = self._unsent[os.write(self.into.fileno(), self._unsent) :]

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None where the keeper is gone or talks nonsense."""
        data = os.read(self.out.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def heard(self) -> None:
        """The grader has reported: the answer it is at now has its whole time before it."""
        self.deadline = time.monotonic() + (self._timeout_s if self.chunk else END_S)

    def at_rest(self) -> list[int]:
        """The grader is gone. What it had not graded is returned."""
        left = list(self.chunk)
        self.chunk.clear()
        self.busy, self.deadline = False, float("inf")
        return left

    def complaint(self) -> str:
        """The last line that keeper or grader has written to its stderr since it was given its chunk."""
        self._stderr.seek(max(self._said_before, os.fstat(self._stderr.fileno()).st_size - 2_000))
        said = self._stderr.read().decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(said) if line.strip()), "")

    def kill(self, *, grace_s: float = 0.0) -> str:
        """End keeper and grader, unless they end within `grace_s`; say how, and what was last complained of."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        # Not reaped yet, the keeper still stands for its group, the grader in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        for stream in (self.into, self.out):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        complaint = self.complaint()
        self._stderr.close()
        return f"signal {-code}" if code < 0 else f"exit {code}: {complaint}"

    def _say(self, message: Any) -> None:
        self._unsent += json.dumps(message).encode() + b"\n"
        self.send()


def _environment() -> dict[str, str]:
    """This process's environment, with this package importable and one thread a worker."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
