"""Two computations in turn, in a thread each: whoever waits for an exchange lets the other go on meanwhile.

    begin    the exchange is launched and does not block (`async_op`, while `are_taken`)
    pass     the turn goes to the other computation, which runs up to its own next exchange
    resume   the turn is back; only now does the first wait for its rows (`groups._finish`)
    end      a computation that is done gives its turn away for good, and the other runs to its end alone

One of them runs at a time, so the order in which exchanges begin is the program's, the same on every rank that runs the
same two. On a GPU both launch to one stream: kernels of one run while the other's rows travel on the stream of NCCL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_pair: _TurnTaking | None = None


class _TurnTaking:
    """State of the turns; number 0 begins. Every wait is for the turn alone, never for an exchange."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._has_ended = [False, False]
        self.num_changes = 0

    def wait_for_turn(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number)

    def pass_on(self) -> None:
        """Give the caller's turn to the other, until that passes it back or ends."""
        with self._changed:
            own = self._turn
            # One that has ended takes no turn: the caller goes on at once, and waits for its exchange alone.
            if self._give(1 - own):
                self._changed.wait_for(lambda: self._turn == own)

    def end(self, number: int) -> None:
        with self._changed:
            self._has_ended[number] = True  # before the turn goes: the other must not wait for it any more
            self._give(1 - number)

    def _give(self, number: int) -> bool:
        if self._has_ended[number]:
            return False
        self._turn, self.num_changes = number, self.num_changes + 1
        self._changed.notify_all()
        return True


def are_taken() -> bool:
    """Tell whether two computations are under way in turn."""
    return _pair is not None


def pass_on() -> None:
    """Let the other computation run; to be called between the beginning of an exchange and its wait."""
    if _pair is not None:
        _pair.pass_on()


def in_turn(first: Callable[[], object], second: Callable[[], object]) -> int:
    """Run both, `first` in this thread; how often the turn changed. Raises what either raises, `first`'s first.

    The other thread computes on the same device and stream and under the same autocast as this one.
    """
    global _pair
    if _pair is not None:
        raise RuntimeError("two computations are under way in turn already")
    pair = _TurnTaking()
    problems: list[BaseException | None] = [None, None]
    like_here = _thread_settings()

    def run(number: int, computation: Callable[[], object]) -> None:
        pair.wait_for_turn(number)
        try:
            computation()
        except BaseException as exc:  # noqa: BLE001 - raised below, once the other has ended
            problems[number] = exc
        finally:
            pair.end(number)

    def run_second() -> None:
        with like_here():
            run(1, second)

    thread = threading.Thread(target=run_second, name="potstill-second", daemon=True)
    _pair = pair
    try:
        thread.start()  # waits until `first` passes its turn on, or ends
        run(0, first)
        thread.join()  # the rest of `second`, alone
    finally:
        _pair = None
    for problem in problems:
        if problem is not None:
            raise problem
    return pair.num_changes


def _thread_settings() -> Callable[[], Any]:
    """A context for another thread that has what torch keeps by thread as it is in this one."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    kind = "cuda" if on_gpu else "cpu"
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    stream = torch.cuda.current_stream() if on_gpu else None

    @contextmanager
    def like_here() -> Iterator[None]:
        with torch.autocast(kind, **autocast), torch.cuda.stream(stream):
            yield

    return like_here
