"""One program in its sandbox: fed, listened to, timed and ended. All that it writes is counted while it is read."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distill.errors import EnvironmentFault
from distill.sandbox.launcher import READY

START_S = 60.0  # for an interpreter to come up on a machine that has much else to do; not counted to the program
END_S = 10.0  # for the kernel to take apart what was killed
LOOK_UP_S = 0.2  # how soon a program is ended when its sandbox is closed
CHUNK_BYTES = 1 << 16
# Statuses of a program that a signal ended: as it is, and as bubblewrap tells it.
OUT_OF_CPU, KILLED = ((-number, 128 + number) for number in (signal.SIGXCPU, signal.SIGKILL))

How = Literal["exit", "wall_time", "cpu_time", "output"]


@dataclass(frozen=True)
class Limits:
    """Limits of a program. The whole program is one process: it may start threads, and nothing else.

    `output_bytes` counts standard output and standard error together; `num_files` are open descriptors. Nothing can be
    written to a file, so there is no limit on size.
    """

    wall_s: float
    cpu_s: float
    memory_bytes: int
    output_bytes: int
    num_threads: int
    num_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """The end of a program. `exit_code` is negative for a signal; `wall_s` counts from when its first line can run."""

    how: How
    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_s: float

    @property
    def killed(self) -> bool:
        """SIGKILL ended it, and we did not send it: itself, someone outside, or a machine that is out of memory."""
        return self.how == "exit" and self.exit_code in KILLED


class SandboxFailure(EnvironmentFault):
    """The sandbox itself did not come up, or not down: no word about the program."""


class SandboxedProgram:
    """A running program. `exchange` speaks with it line by line, `finish` waits for its end, `kill` is always safe."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        opening: Callable[[int], bytes],
        limits: Limits,
        stop: threading.Event,
    ) -> None:
        self._limits = limits
        self._stop = stop
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                cwd="/",
                bufsize=0,
                start_new_session=True,
            )
        except OSError as exc:
            raise SandboxFailure(f"cannot be started ({exc})", where=command[0]) from exc
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._in, self._out, self._err = process.stdin, process.stdout, process.stderr
        os.set_blocking(self._in.fileno(), False)
        self._pidfd = os.pidfd_open(process.pid)
        self._poll = select.poll()
        for descriptor in (self._out.fileno(), self._err.fileno(), self._pidfd):
            self._poll.register(descriptor, select.POLLIN)
        self._listened = {self._out.fileno(), self._err.fileno()}
        self._awake = self._ended = False
        self._pending = memoryview(b"")
        self._num_bytes = 0
        self._stdout, self._stderr = bytearray(), bytearray()
        self._started: float | None = None
        self.wall_s = 0.0
        self._close_input = False
        try:
            self._await_start(opening(process.pid))
        except BaseException:
            self.kill()
            raise

    def _await_start(self, opening: bytes) -> None:
        """Wait for the interpreter's sign that it is there, tell it what to become, and wait until it has become it.

        Before the sign, bubblewrap may not have tied its children's lives to its own: nothing is sent that could run.
        """
        self._pump(lambda: bool(self._stdout), time.monotonic() + START_S)
        if self._stdout:
            self._awake = True
            del self._stdout[:1]
            self._give(opening)
            self._pump(lambda: bool(self._stdout), time.monotonic() + START_S)
        if bytes(self._stdout[:1]) != READY:
            self._pump(lambda: False, time.monotonic() + END_S)
            said = self._stderr.decode(errors="replace").strip().replace("\n", " ")[-300:]
            raise SandboxFailure(f"does not start: {said or 'it says nothing'}", where="sandbox")
        del self._stdout[:1]
        self._num_bytes = len(self._stdout) + len(self._stderr)
        self._started = time.monotonic()

    @property
    def _deadline(self) -> float:
        assert self._started is not None
        return self._started + self._limits.wall_s

    @property
    def timed_out(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def overflowed(self) -> bool:
        return self._num_bytes > self._limits.output_bytes

    def exchange(self, line: bytes) -> bytes | None:
        """Send a line, get a line without its end; None where the program ends, is out of time or says too much."""
        self._give(line + b"\n")
        self._pump(lambda: b"\n" in self._stdout, self._deadline)
        said, end, rest = self._stdout.partition(b"\n")
        if not end or self.overflowed:
            return None
        self._stdout = rest
        return bytes(said)

    def finish(self, line: bytes = b"") -> Outcome:
        """Give it the rest of its input, let it run to its end or to a limit, and kill what is left of it."""
        self._give(line, last=True)
        self._pump(lambda: False, self._deadline)
        wall = self.timed_out and not self._ended
        self.kill()
        how: How = "exit"
        if self.overflowed:
            how = "output"
        elif wall:
            how = "wall_time"
        elif self._process.returncode in OUT_OF_CPU:
            how = "cpu_time"
        elif self._process.returncode in KILLED and self.wall_s >= self._limits.cpu_s:
            how = "cpu_time"  # it ignored the first signal
        most = self._limits.output_bytes
        code = self._process.returncode
        return Outcome(how, code, bytes(self._stdout[:most]), bytes(self._stderr[:most]), self.wall_s)

    def kill(self) -> None:
        """End it and all that belongs to it, and wait until it is gone. Any number of times."""
        if self._process.returncode is not None:
            return
        if not self._awake:  # it waits to be told what to become: that nothing comes ends it, and all that it made
            self._in.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._process.wait()
        if self._started is not None:
            self.wall_s = time.monotonic() - self._started
        # The first process of its name space holds these pipes until all the others are dead.
        self._drain(time.monotonic() + END_S)
        for stream in (self._in, self._out, self._err):
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self._pidfd)

    def _give(self, data: bytes, *, last: bool = False) -> None:
        self._pending = memoryview(bytes(self._pending) + data)
        self._close_input = last
        self._write()

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._in.fileno(), self._pending) :]
        except BlockingIOError:
            self._poll.register(self._in.fileno(), select.POLLOUT)
            return
        except BrokenPipeError:
            self._pending = memoryview(b"")
        if not self._in.closed:
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._in.fileno())
            if self._close_input:
                self._in.close()

    def _pump(self, enough: Callable[[], bool], deadline: float) -> None:
        """Move bytes both ways until `enough`, the end, the deadline, or more output than is allowed."""
        while not enough() and not self.overflowed:
            if self._stop.is_set():
                self.kill()
                raise SandboxFailure("closed while a program ran", where="sandbox")
            if self._ended:
                self._drain(time.monotonic() + END_S)
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for descriptor, _ in self._poll.poll(min(left, LOOK_UP_S) * 1_000 + 1):
                if descriptor == self._pidfd:
                    self._ended = True
                    self._poll.unregister(self._pidfd)
                elif descriptor in self._listened:
                    self._read(descriptor)
                else:
                    self._write()

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, CHUNK_BYTES)
        if not data:
            self._listened.discard(descriptor)
            self._poll.unregister(descriptor)
            return
        if not self.overflowed:
            (self._stdout if descriptor == self._out.fileno() else self._stderr).extend(data)
        self._num_bytes += len(data)

    def _drain(self, deadline: float) -> None:
        """Read what is left in the pipes until their other ends are closed."""
        poll = select.poll()
        for descriptor in self._listened:
            poll.register(descriptor, select.POLLIN)
        while self._listened and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1_000 + 1):
                self._read(descriptor)
                if descriptor not in self._listened:
                    poll.unregister(descriptor)
        if self._listened:
            raise SandboxFailure("a killed program still holds its output", where="sandbox")
