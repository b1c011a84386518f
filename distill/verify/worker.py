"""The processes in which a model's text is graded: `python -m distill.verify.worker TIMEOUT_S MEMORY_BYTES`.

The process that the pool starts, the keeper, never looks at an answer. It imports what the graders need, which takes
seconds, and forks a grader for each chunk of answers, which takes milliseconds; so a grader can be killed without a
thought, and what one answer has done to its process is gone with the chunk.

    pool to keeper      a line with a JSON list of answers;  "kill"
    grader to pool      {"ready": 1}, then a line with state and detail an answer
    keeper to pool      {"ended": how} when the grader is gone, or could not be forked

A grader limits its memory and what it may write, and asks the kernel to end it should an answer take far too long. It
dies with its keeper; the keeper ends when the pool's end of the pipe is closed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECURSION_LIMIT = 2_000
MAX_FILES = 64
MAX_FILE_BYTES = 1 << 20  # what a dying grader may complain of
PROBE_BYTES = 64 << 20
PR_SET_PDEATHSIG = 1


def main() -> None:
    timeout_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    # What a library prints must not get between the reports.
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    from distill.verify.grading import Graders

    graders = Graders()
    lines = _Lines(0)
    for line in lines:
        tasks = json.loads(line)
        if tasks == "kill":
            continue  # it has ended by itself
        graders.prepare(tasks)
        gc.freeze()  # or the collector would copy every page that keeper and grader share
        ended, still_open = os.pipe()
        try:
            grader = os.fork()
        except OSError as exc:
            _report(out, {"ended": f"cannot fork ({exc.strerror})"})
            continue
        if grader == 0:
            os.close(ended)
            _be_grader(graders, tasks, out, timeout_s, memory_bytes)
        os.close(still_open)
        _report(out, {"ended": _watch(grader, ended, lines)})
        os.close(ended)


class _Lines:
    """Lines of a pipe that can also be waited for together with another one; the end of the pipe ends the process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""

    def __iter__(self) -> Iterator[bytes]:
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                yield line
            elif not self.fill():
                return

    def fill(self) -> bool:
        """Read what is there; False at the end of the pipe."""
        data = os.read(self.descriptor, 1 << 20)
        self._rest += data
        return bool(data)


def _watch(grader: int, ended: int, lines: _Lines) -> str:
    """Wait for the grader's end, bringing it about where the pool says so or is gone."""
    while True:
        ready, _, _ = select.select([ended, lines.descriptor], [], [])
        if ended not in ready:
            lines.fill()  # "kill" is all that comes while a grader works, if it is not the end of the pipe
            os.kill(grader, signal.SIGKILL)
        _, status = os.waitpid(grader, 0)
        code = os.waitstatus_to_exitcode(status)
        return f"signal {-code}" if code < 0 else f"exit {code}"


def _be_grader(graders: Any, tasks: Sequence[dict[str, Any]], out: int, timeout_s: float, memory_bytes: int) -> None:
    code = 1
    try:
        _confine(memory_bytes)
        _report(out, {"ready": 1})
        for task in tasks:
            # SIGALRM's default action ends the process without asking Python, which a loop in C would not let speak.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
            state, detail = _grade(graders, task, memory_bytes)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _report(out, {"state": state, "detail": detail})
        code = 0
    except BaseException:  # noqa: BLE001  told to the pool, which reads the last line
        traceback.print_exc()
    finally:
        os._exit(code)


def _grade(graders: Any, task: dict[str, Any], memory_bytes: int) -> tuple[str, str]:
    """The verdict; raises MemoryError where it is not the answer that wants too much: the machine has none to give."""
    try:
        state, detail = graders.grade(task)
    except MemoryError:
        _probe_memory()
        return "timeout", f"out of the {memory_bytes >> 20} MiB that grading may take"
    if state != "correct":
        # math-verify takes any exception inside it for "not equal", this one too.
        _probe_memory()
    return state, detail


def _probe_memory() -> None:
    """Raise MemoryError where no more memory is to be had; touches none."""
    try:
        mmap.mmap(-1, PROBE_BYTES).close()
    except OSError as exc:
        raise MemoryError from exc


def _confine(memory_bytes: int) -> None:
    """Confine the grader: no more memory than `memory_bytes` beside what it was born with, no files to speak of."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    born_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, amount in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, born_with + memory_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_FILES),
    ):
        _, hard = resource.getrlimit(what)
        amount = amount if hard < 0 else min(amount, hard)
        resource.setrlimit(what, (amount, amount))


def _report(out: int, message: dict[str, Any]) -> None:
    os.write(out, json.dumps(message).encode() + b"\n")  # shorter than a pipe's atomic write


if __name__ == "__main__":
    main()
