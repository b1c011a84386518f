"""Samples to the ledger as they arrive, by a thread of its own: whoever collects them waits for no disk.

All that has arrived while the last batch was written is the next one, so that a sample waits for a tenth of a second
and a commit, whether samples come by the thousand or one an hour.
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Self

from distill.ledger import Ledger
from distill.records import Trace

REST_S = 0.1  # between commits: samples that come one by one shall not cost a commit each


class LedgerWriter:
    """`put` samples inside the block; its end has all of them stored, however it is left.

    The ledger belongs to the block: nobody else may use it until then. What the ledger raises (EnvironmentFault for a
    full disk) is raised by the next `put`, or by the block's end.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._arrived: queue.SimpleQueue[Trace | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="ledger-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._arrived.put(None)
        self._thread.join()
        if kind is None and self._fault is not None:
            raise self._fault

    def put(self, trace: Trace) -> None:
        if self._fault is not None:
            raise self._fault
        self._arrived.put(trace)

    def _write(self) -> None:
        try:
            ended = False
            while not ended:
                batch = self._batch()
                ended = batch[-1] is None
                self._ledger.add(trace for trace in batch if trace is not None)
                self._ending.wait(REST_S)
        except Exception as exc:  # noqa: BLE001 - it is raised where samples are collected
            self._fault = exc

    def _batch(self) -> list[Trace | None]:
        """What has arrived, at least one; None is the last that ever does."""
        batch = [self._arrived.get()]
        while batch[-1] is not None:
            try:
                batch.append(self._arrived.get_nowait())
            except queue.Empty:
                break
        return batch
