"""The thread that stores samples as they arrive: none is lost that was put, and a full disk is heard of."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from distill.errors import EnvironmentFault
from distill.ledger import Ledger
from distill.ledger_writer import LedgerWriter
from distill.records import Trace
from tests.distill.ledger_writer import KEYS, trace


def test_a_sample_is_on_the_disk_while_the_next_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger.open(path) as ledger, LedgerWriter(ledger) as writer:
        for number in range(3):
            writer.put(trace(number))
            deadline = time.monotonic() + 20
            while sqlite3.connect(path).execute("SELECT count(*) FROM traces").fetchone() != (number + 1,):
                assert time.monotonic() < deadline, "it waits for more to come"
                time.sleep(0.01)


def test_what_comes_together_is_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def counted(ledger: Ledger, traces: Iterable[Trace], add=Ledger.add) -> int:
        traces = list(traces)
        batches.append(len(traces))
        return add(ledger, traces)

    monkeypatch.setattr(Ledger, "add", counted)
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        with LedgerWriter(ledger) as writer:
            for number in range(2_000):
                writer.put(trace(number))
        assert list(ledger.traces(KEYS[:2_000])) == [trace(number) for number in range(2_000)]
    assert sum(batches) == 2_000
    assert len(batches) < 200


def put(writer_of: Ledger | FullDisk, count: int, *, pause_s: float = 0.0, then: BaseException | None = None) -> None:
    with LedgerWriter(writer_of) as writer:
        for number in range(count):
            writer.put(trace(number))
            time.sleep(pause_s)
        if then is not None:
            raise then


def test_whatever_ends_the_block_all_is_stored(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(KeyboardInterrupt):
            put(ledger, 300, then=KeyboardInterrupt())
        assert len(ledger) == 300
        put(ledger, 0)
        assert len(ledger) == 300


class FullDisk:
    def add(self, traces: Iterable[Trace]) -> int:
        raise EnvironmentFault("No space left on device")


def test_a_full_disk_ends_the_work() -> None:
    with pytest.raises(EnvironmentFault, match="No space"):
        put(FullDisk(), 1)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match="No space"):
        put(FullDisk(), 4_000, pause_s=0.01)  # a teacher that goes on for long
    assert time.monotonic() - started < 30
    with pytest.raises(KeyboardInterrupt):
        put(FullDisk(), 1, then=KeyboardInterrupt())
