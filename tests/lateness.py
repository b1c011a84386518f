"""What a machine that does other things adds to a time: how much later than asked a thread wakes up."""

from __future__ import annotations

import subprocess
import threading
import time

STEP_S = 0.01


class Lateness:
    """Within the block it counts; `total_s` is the sum."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Lateness:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _count(self) -> None:
        while not self._over.is_set():
            begun = time.perf_counter()
            time.sleep(STEP_S)
            self.total_s += time.perf_counter() - begun - STEP_S


def seconds_to_end(process: subprocess.Popen[str], *, signal: int) -> float:
    """Send a signal, wait for the process, and say how long that took beyond what the machine added."""
    with Lateness() as late:
        begun = time.perf_counter()
        process.send_signal(signal)
        process.wait(60)
        took = time.perf_counter() - begun
    return took - late.total_s
