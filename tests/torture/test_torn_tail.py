"""A write that was torn at any byte: what was acknowledged before it is there, whole and once, without an error."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from distill import export
from distill.export import export_traces
from distill.ledger import Ledger
from distill.records import Verdict
from tests.distill.ledger_writer import KEYS, trace

NUM_BEFORE = 40


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the machine has such a place: tens of thousands of small files are opened and synced."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


def last_write(ledger: Ledger, what: str) -> None:
    if what == "samples":
        ledger.add(trace(index) for index in range(NUM_BEFORE, NUM_BEFORE + 3))
    else:
        ledger.add_verdicts((KEYS[index], "g", Verdict(state="wrong", detail="x" * 50)) for index in range(10, 20))


class Torn:
    """A ledger as a crash would leave it, with its write-ahead log, which the last write had made longer."""

    def __init__(self, folder: Path, what: str) -> None:
        self.what = what
        self.path = folder / "torn.sqlite"
        self._wal = folder / "torn.sqlite-wal"
        source = folder / "source.sqlite"
        wal = folder / "source.sqlite-wal"
        with Ledger.open(source) as ledger:
            for start in range(0, NUM_BEFORE, 4):
                ledger.add(trace(index) for index in range(start, start + 4))
            ledger.add_verdicts((KEYS[index], "g", Verdict(state="correct")) for index in range(10))
            self.begin = wal.stat().st_size
            last_write(ledger, what)
            self.end = wal.stat().st_size
            self._log = wal.read_bytes()
            self._file = source.read_bytes()

    def check(self, log: bytes) -> bool:
        """Whether the last write survived; all else must be as if it had never been begun."""
        self.path.write_bytes(self._file)
        self._wal.write_bytes(log)
        with Ledger.open(self.path) as ledger:
            num_samples, num_verdicts = len(ledger), ledger.num_verdicts()
            whole = (num_samples, num_verdicts) != (NUM_BEFORE, 10)
            if whole:
                assert (num_samples, num_verdicts) == ((NUM_BEFORE + 3, 10) if self.what == "samples" else (40, 20))
            assert list(ledger.traces(KEYS[:NUM_BEFORE])) == BEFORE
            assert len(ledger.verdicts((key, "g") for key in KEYS[:10])) == 10
            last_write(ledger, self.what)  # the same command again
            assert (len(ledger), ledger.num_verdicts()) == ((43, 10) if self.what == "samples" else (40, 20))
        return whole

    def cut(self, at: int) -> bytes:
        return self._log[:at]

    def flipped(self, at: int, by: int) -> bytes:
        return self._log[:at] + bytes([self._log[at] ^ by]) + self._log[at + 1 :]


BEFORE = [trace(index) for index in range(NUM_BEFORE)]


def tear(folder: Path, what: str, stride: int) -> int:
    torn, rng = Torn(folder, what), random.Random(4)
    assert torn.check(torn.cut(torn.end))
    assert not torn.check(torn.cut(torn.begin))
    places = sorted({*range(torn.begin, torn.end, stride), torn.begin + 1, torn.end - 1})
    for at in places:
        assert not torn.check(torn.cut(at)), f"cut at byte {at} of {torn.end}"
        assert not torn.check(torn.flipped(at, rng.randrange(1, 256))), f"flipped at byte {at} of {torn.end}"
    return len(places)


@pytest.mark.parametrize("what", ["samples", "verdicts"])
def test_some_bytes_of_the_last_write(folder: Path, what: str) -> None:
    assert tear(folder, what, 151) > 25


@pytest.mark.torture
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("what", ["samples", "verdicts"])
def test_every_byte_of_the_last_write(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = tear(folder, what, 1)
    with capsys.disabled():
        print(f"\nlast write of {what}: cut and flipped at each of {count} bytes, 0 lost, 0 doubled")  # noqa: T201


# --- exports ----------------------------------------------------------------------------------------------------------

COUNT = 40


def publish(folder: Path) -> dict[str, int]:
    with Ledger.open(folder / "l.sqlite") as ledger:
        return export_traces(ledger, lambda: iter(KEYS[:COUNT]), folder / "traces")


def damaged(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    rng = random.Random(5)
    for at in places:
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def tear_export(folder: Path, monkeypatch: pytest.MonkeyPatch, stride: int) -> int:
    """An export that was stopped before its renaming, with its list and its shards damaged in every place."""
    monkeypatch.setattr(export, "ROW_GROUP", 8)
    monkeypatch.setattr(export, "SHARD_ROWS", 16)
    with Ledger.open(folder / "l.sqlite") as ledger:
        ledger.add(trace(index) for index in range(COUNT))
    counts = publish(folder)
    straight = {path.name: path.read_bytes() for path in (folder / "traces").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(export, "_publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            publish(folder)
    staged = {path: path.read_bytes() for path in [folder / ".traces.pending.json", *folder.glob(".traces.pending/*")]}
    assert len(staged) == 4
    count = 0
    for victim in (folder / ".traces.pending.json", folder / ".traces.pending" / "part-00002.parquet"):
        data = staged[victim]
        for torn in damaged(data, range(0, len(data), stride)):
            (folder / ".traces.pending").mkdir(exist_ok=True)
            for path, whole in staged.items():
                path.write_bytes(torn if path == victim else whole)
            assert publish(folder) == counts
            assert {path.name: path.read_bytes() for path in (folder / "traces").iterdir()} == straight
            assert sorted(path.name for path in folder.iterdir()) == ["l.sqlite", "l.sqlite.lock", "traces"]
            count += 1
    return count


def stopped(*folders: Path) -> None:
    raise KeyboardInterrupt


def test_some_bytes_of_a_stopped_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tear_export(folder, monkeypatch, 97) > 50


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_every_byte_of_a_stopped_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = tear_export(folder, monkeypatch, 1)
    with capsys.disabled():
        print(f"\nstopped export: {count} damaged pending lists and shards, each export the same bytes")  # noqa: T201
