"""A large file is read once, until it changes; an entry that is damaged or out of date is not believed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from distill.hash_cache import LEAST_BYTES, VARIABLE, HashCache
from distill.manifest import hash_file

AT_ONCE = -10 * 10**9  # as if every file had settled long ago


class Reader:
    """Gives every reading of a file another hash, and counts the readings."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path) -> str:
        self.count += 1
        return f"{self.count:064x}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    return path


def entry_of(tmp_path: Path) -> Path:
    (entry,) = (tmp_path / "cache").glob("*.json")
    return entry


def test_a_file_is_read_once_whoever_asks(tmp_path: Path, file: Path) -> None:
    read = Reader()
    first = HashCache(tmp_path / "cache", settled_ns=AT_ONCE).digest(file, read)
    (tmp_path / "link").symlink_to(file)
    assert HashCache(tmp_path / "cache", settled_ns=AT_ONCE).digest(tmp_path / "link", read) == first
    assert read.count == 1


@pytest.mark.parametrize("change", ["bytes", "bytes and time put back", "replaced", "size"])
def test_a_file_that_changed_is_read_again(tmp_path: Path, file: Path, change: str) -> None:
    cache, read = HashCache(tmp_path / "cache", settled_ns=AT_ONCE), Reader()
    before = file.stat()
    cache.digest(file, read)
    time.sleep(0.05)  # the file system's clock has ticks
    if change == "replaced":
        (tmp_path / "other").write_bytes(b"two")
        os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "other").replace(file)
    else:
        file.write_bytes(b"three" if change == "size" else b"two")
    if change == "bytes and time put back":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    second = cache.digest(file, read)
    assert read.count == 2
    assert cache.digest(file, read) == second
    assert read.count == 2


def test_a_file_that_changes_while_it_is_read_is_not_entered(tmp_path: Path, file: Path) -> None:
    cache, read = HashCache(tmp_path / "cache", settled_ns=AT_ONCE), Reader()

    def overtaken(path: Path) -> str:
        time.sleep(0.05)
        path.write_bytes(b"two")
        return read(path)

    cache.digest(file, overtaken)
    cache.digest(file, read)
    assert read.count == 2


def test_a_file_that_has_only_just_changed_is_not_entered(tmp_path: Path, file: Path) -> None:
    cache, read = HashCache(tmp_path / "cache"), Reader()
    cache.digest(file, read)
    cache.digest(file, read)
    assert read.count == 2


def test_damaged_entries_are_not_believed(tmp_path: Path, file: Path) -> None:
    cache, read = HashCache(tmp_path / "cache", settled_ns=AT_ONCE), Reader()
    cache.digest(file, read)
    entry = entry_of(tmp_path)
    whole = entry.read_bytes()
    content = json.loads(whole)
    damaged = [b"", whole[:-20], b"[]", b"{}", b"\xff\xfe", b'{"sha256": 3, "seal": 4}']
    damaged += [json.dumps({**content, "sha256": "f" * 64}).encode(), whole.replace(b"1", b"2")]
    for number, bytes_ in enumerate(damaged, start=2):
        entry.write_bytes(bytes_)
        assert int(cache.digest(file, read), 16) == read.count == number
        assert json.loads(entry.read_bytes())["sha256"] == f"{number:064x}", "and it is replaced"


def test_an_entry_of_another_file_is_not_believed(tmp_path: Path, file: Path) -> None:
    cache, read = HashCache(tmp_path / "cache", settled_ns=AT_ONCE), Reader()
    cache.digest(file, read)
    first = entry_of(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(b"two")
    cache.digest(other, read)
    (second,) = set((tmp_path / "cache").glob("*.json")) - {first}
    second.write_bytes(first.read_bytes())
    cache.digest(other, read)
    assert read.count == 3


def test_a_cache_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache, read = HashCache(tmp_path / "cache", settled_ns=AT_ONCE), Reader()
    cache.digest(file, read)
    cache.digest(file, read)
    assert read.count == 2


def test_large_files_alone_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `hash_file`, with the margin that it has: the file must have settled."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "small").write_bytes(b"x")
    with (folder / "large").open("wb") as file:
        file.truncate(LEAST_BYTES)
    first = hash_file(folder)
    assert not list((tmp_path / "cache").rglob("*.json"))
    time.sleep(2.1)
    assert hash_file(folder) == first
    (entry,) = (tmp_path / "cache" / "hashes").glob("*.json")
    content = json.loads(entry.read_bytes())
    assert content["file"] == str(folder / "large")
    assert content["sha256"] == hash_file(folder / "large")
    with (folder / "large").open("r+b") as file:
        file.write(b"y")
    assert hash_file(folder) != first
