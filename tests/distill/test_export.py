"""Publishing traces as shards: killed or damaged anywhere, the same call ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill import export
from distill.errors import DataError
from distill.export import export_traces
from distill.failpoints import FAILPOINTS, VARIABLE
from distill.ledger import Ledger
from distill.records import Trace
from distill.tables import read_records
from tests.distill.ledger_writer import KEYS, trace
from tests.repository import REPOSITORY

COUNT = 100
EXPORT = """
import sys
from pathlib import Path
from distill import export
from distill.ledger import Ledger
from tests.distill.ledger_writer import KEYS
export.ROW_GROUP, export.SHARD_ROWS = 8, 24
with Ledger.open(Path(sys.argv[1]) / "l.sqlite") as ledger:
    export.export_traces(ledger, lambda: iter(KEYS[:100]), Path(sys.argv[1]) / "traces")
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROW_GROUP", 8)
    monkeypatch.setattr(export, "SHARD_ROWS", 24)


def fill(folder: Path, count: int = COUNT) -> Path:
    with Ledger.open(folder / "l.sqlite") as ledger:
        ledger.add(trace(index, "long " * 40 * index) for index in range(count))
    return folder


def publish(folder: Path, count: int = COUNT) -> dict[str, int]:
    with Ledger.open(folder / "l.sqlite") as ledger:
        return export_traces(ledger, lambda: iter(KEYS[:count]), folder / "traces")


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "traces").iterdir())}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = fill(tmp_path_factory.mktemp("straight"))
    code = subprocess.run([sys.executable, "-c", EXPORT, folder], env=environment(), check=False).returncode
    assert code == 0
    return published(folder)


def environment(failpoint: str = "") -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), VARIABLE: failpoint}


def test_all_samples_in_their_order_in_bounded_shards(tmp_path: Path, straight: dict[str, bytes]) -> None:
    counts = publish(fill(tmp_path))
    assert counts == {"samples": COUNT, "tokens": sum(range(COUNT)), "truncated": 0}
    assert read_records(tmp_path / "traces", Trace) == [trace(index, "long " * 40 * index) for index in range(COUNT)]
    assert list(published(tmp_path)) == [f"part-0000{number}.parquet" for number in range(5)]
    assert published(tmp_path) == straight
    assert not leftovers(tmp_path)


def test_long_answers_make_smaller_groups_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_BYTES", 30_000)
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    publish(fill(tmp_path))
    assert read_records(tmp_path / "traces", Trace) == [trace(index, "long " * 40 * index) for index in range(COUNT)]
    assert len(published(tmp_path)) > 12


PLACES = [f"{name}:{count}" for name in FAILPOINTS if name.startswith("export.") for count in (1, 3)]
ONCE = {"export.pending", "export.complete", "export.set_aside", "export.renamed"}


@pytest.mark.parametrize("place", [place for place in PLACES if place.endswith(":1") or place[:-2] not in ONCE])
def test_a_killed_export_goes_on(tmp_path: Path, straight: dict[str, bytes], place: str) -> None:
    publish(fill(tmp_path, 40), 40)
    earlier = published(tmp_path)
    fill(tmp_path)
    killed = subprocess.run([sys.executable, "-c", EXPORT, tmp_path], env=environment(place), check=False)
    assert killed.returncode == -signal.SIGKILL
    if (tmp_path / "traces").exists():  # readers see the old export or the new one, whole
        assert published(tmp_path) == (straight if place == "export.renamed:1" else earlier)
    made = {path: path.stat().st_ino for path in tmp_path.glob(".traces.pending/part-*.parquet")}
    publish(tmp_path)
    assert published(tmp_path) == straight
    assert all((tmp_path / "traces" / path.name).stat().st_ino == inode for path, inode in made.items())
    assert not leftovers(tmp_path)


def staged(folder: Path) -> Path:
    """An export of everything that was stopped before its renaming."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", EXPORT, fill(folder)], env=environment("export.complete"), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    return folder


def test_what_is_torn_is_written_again(tmp_path: Path, straight: dict[str, bytes]) -> None:
    source = staged(tmp_path / "source")
    pending, shard = ".traces.pending.json", ".traces.pending/part-00002.parquet"
    for name, cuts in ((pending, offsets(source / pending)), (shard, offsets(source / shard))):
        for cut in cuts:
            folder = tmp_path / "torn"
            shutil.copytree(source, folder)
            with (folder / name).open("r+b") as file:
                file.truncate(cut)
            publish(folder)
            assert published(folder) == straight
            assert not leftovers(folder)
            shutil.rmtree(folder)


def offsets(path: Path) -> Iterator[int]:
    size = path.stat().st_size
    return iter((0, 1, size // 2, size - 1))


def test_a_list_of_other_samples_counts_for_nothing(tmp_path: Path) -> None:
    """A sample that a merge has exchanged, and a run that now wants more, make the shards that hold them anew."""
    source = staged(tmp_path / "source")
    with Ledger.open(source / "l.sqlite") as ledger:
        changed = trace(50, "another")
        ledger._write("DELETE FROM traces WHERE key = ?", [(changed.key,)])
        ledger.add([changed, *(trace(index) for index in range(100, 110))])
    shutil.copytree(source, tmp_path / "more")
    publish(source)
    assert [t.text for t in read_records(source / "traces", Trace)][50] == "another"
    publish(tmp_path / "more", 110)
    assert [t.key for t in read_records(tmp_path / "more" / "traces", Trace)] == KEYS[:110]
    clean = tmp_path / "clean"
    clean.mkdir()
    shutil.copy(source / "l.sqlite", clean / "l.sqlite")
    publish(clean, 110)
    assert published(clean) == published(tmp_path / "more")


def test_nothing_is_published_where_a_sample_is_missing(tmp_path: Path) -> None:
    publish(fill(tmp_path, 30), 30)
    before = published(tmp_path)
    with pytest.raises(DataError, match=f"{KEYS[30]}: has no such sample"):
        publish(tmp_path, 40)
    assert published(tmp_path) == before


def test_no_samples_are_an_empty_table(tmp_path: Path) -> None:
    assert publish(tmp_path, 0) == {"samples": 0, "tokens": 0, "truncated": 0}
    assert read_records(tmp_path / "traces", Trace) == []
    (tmp_path / "traces" / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00000\.parquet: no such file"):
        read_records(tmp_path / "traces", Trace)
