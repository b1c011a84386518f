"""The process in which a model's text is graded: `python -m distill.verify.worker TIMEOUT_S`, spoken to by the pool.

It reads a line with a JSON list of answers, says `{"ready": 1}` when all it needs is imported, and then one line an
answer. It limits its own memory, and asks the kernel to end it should an answer take far too long: the parent, which
kills it in time, may be gone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import IO, Any

MEMORY_BYTES = 4 * 2**30
RECURSION_LIMIT = 2_000


def main() -> None:
    timeout_s = float(sys.argv[1])
    # What a library prints must not get between the reports.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    from distill.verify.grading import Graders

    graders = Graders()
    for line in sys.stdin.buffer:
        tasks = json.loads(line)
        graders.prepare(tasks)
        print_line(out, {"ready": 1})
        _grade(graders, tasks, out, timeout_s)


def _grade(graders: Any, tasks: Sequence[dict[str, Any]], out: IO[str], timeout_s: float) -> None:
    for task in tasks:
        # The default action of SIGALRM ends the process without asking Python, which a loop in C would never let speak.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
        try:
            state, detail = graders.grade(task)
        except MemoryError:
            state, detail = "timeout", f"out of the {MEMORY_BYTES >> 30} GiB a grader may use"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print_line(out, {"state": state, "detail": detail})


def print_line(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _limit() -> None:
    for what, amount in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY_BYTES)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (amount if hard < 0 else min(amount, hard), hard))
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.dont_write_bytecode = True


if __name__ == "__main__":
    main()
