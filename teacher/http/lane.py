"""Work that would hold the event loop up, done beside it."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Lane:
    """A thread that does one piece of work after the other; `most` may wait for it."""

    def __init__(self, name: str, most: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._most = most
        self._num_waiting = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Raises `queue.Full` where too many wait already."""
        if self._num_waiting >= self._most:
            raise queue.Full
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_waiting -= 1


def dumps_in_turns(tree: Any) -> str:
    """JSON of something large, for a thread: Python's own encoder lets others have the interpreter, C's does not."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(encoder.iterencode(tree))
