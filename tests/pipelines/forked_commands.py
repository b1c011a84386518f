"""Runs commands, each in a fork of a process that has imported what they need: they begin in milliseconds.

    python -m tests.pipelines.forked_commands     lines of JSON: {"arguments", "cwd"} in; code, CPU seconds, memory out

Whatever asks on standard input is told `y`. A command that is not done in time is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

TIMEOUT_S = 240.0
YES = b"y\n" * 1_000


def main() -> None:
    import eval.harness  # noqa: F401
    import pipelines.chain
    import pipelines.doctor  # noqa: F401
    import students.preflight  # noqa: F401
    import teacher.backends.native.opening
    import teacher.backends.transformers
    import teacher.http.app  # noqa: F401
    from pipelines.cli import main as potstill

    _say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(potstill, request["arguments"], Path(request["cwd"]))
        code, usage = _wait(child, time.monotonic() + TIMEOUT_S)
        _say({"code": code, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss << 10})


def _become(potstill, arguments: list[str], cwd: Path) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        readable, writable = os.pipe()
        os.write(writable, YES)
        os.dup2(readable, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{cwd}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["potstill", *arguments]
        try:
            potstill()
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:  # noqa: BLE001  as Python itself would
            sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float):
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it may have left
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
