"""SIGTERM as an exception, so that a stage that a scheduler stops leaves as one that Ctrl-C stops: tidily."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distill.errors import Preempted


@contextmanager
def preemptible() -> Iterator[None]:
    """Inside the block SIGTERM raises Preempted (exit 75). Off the main thread Python has no handlers: no change."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Preempted("stopped by SIGTERM; the same command goes on from here")
