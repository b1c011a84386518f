"""Documents read beside the event loop: small ones at once, large ones in a process of its own.

Four megabytes of brackets take Python's reader hundreds of milliseconds, in which no other thread of the process runs;
a thread is no help. The process lives from `start`, or else from the first large document, until `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys
from pathlib import Path
from typing import Any

from teacher.admission import documents
from teacher.admission.documents import LENGTH, DocumentError
from teacher.admission.refusals import Refused

# At most five milliseconds of the loop's time, whatever they hold.
SMALL_BYTES = 2**14
# Four megabytes of anything take it a second.
READ_S = 20.0
# Large documents that may wait for their turn: 256 MiB.
MAX_WAITING = 64


class Reader:
    """Reads documents for one event loop, large ones one after the other."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def loads(self, data: bytes, *, max_length: int | None = None) -> Any:
        """As `documents.loads`. Raises Refused where the document is wrong, or cannot be read for now."""
        try:
            if len(data) <= SMALL_BYTES:
                return documents.loads(data, max_length=max_length)
            tree, fault = await self._in_turn(data, max_length)
            if fault is not None:
                raise DocumentError(*fault)
        except DocumentError as exc:
            message = exc.message if exc.path is None else f"Invalid '{exc.path}': it {exc.message}."
            raise Refused(400, message, param=exc.path, code=exc.code) from None
        return tree

    async def start(self) -> None:
        """Start the process now: the loop is held up until it runs, which on a busy machine takes a moment."""
        await self._running()

    async def close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _in_turn(self, data: bytes, max_length: int | None) -> Any:
        if self._num_waiting >= MAX_WAITING:
            raise Refused(429, "too many large requests are waiting; try again later")
        self._num_waiting += 1
        try:
            async with self._turn:
                return await self._asked(data, max_length)
        finally:
            self._num_waiting -= 1

    async def _asked(self, data: bytes, max_length: int | None) -> Any:
        try:
            async with asyncio.timeout(READ_S):
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                question = pickle.dumps((max_length, data))
                process.stdin.write(LENGTH.pack(len(question)) + question)
                await process.stdin.drain()
                (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
                return pickle.loads(await process.stdout.readexactly(length))
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as exc:
            await self.close()
            raise Refused(503, "the body could not be read now; try again") from exc
        except asyncio.CancelledError:
            await self.close()  # an answer that nobody has taken would be taken for the next one's
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            # A session of its own: a Ctrl-C at the terminal is for this process.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(Path(documents.__file__)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=2**20,
                start_new_session=True,
            )
        return self._process
