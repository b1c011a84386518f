"""The ledger under what really happens: SIGKILL, a second writer, damage, a full disk."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from distill.errors import DataError, EnvironmentFault
from distill.failpoints import VARIABLE
from distill.ledger import Ledger
from distill.records import Problem, Trace
from distill.tables import read_records, write_records
from tests.distill.ledger_writer import KEYS, trace
from tests.repository import REPOSITORY

CREDIT = 12  # batches that one writer may add: twenty killed ones never come to the end


def start_writer(path: Path, seed: int, *, credit: int = -1, failpoint: str = "") -> subprocess.Popen[str]:
    """A process that adds what is missing, in an order of its own; with `credit` it waits after so many batches."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distill.ledger_writer", str(path), str(seed), str(credit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), VARIABLE: failpoint},
    )


def killed_writers(path: Path) -> Iterator[set[str]]:
    """Twenty of them, each with what it had reported as stored: eight die at a failpoint, twelve whenever it hits."""
    rng = random.Random(5)
    for turn in range(20):
        failpoint = ("ledger.inserted", "ledger.committed")[turn % 2] + f":{1 + turn}" if turn < 8 else ""
        writer = start_writer(path, turn, credit=CREDIT, failpoint=failpoint)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        lines = [] if failpoint else [writer.stdout.readline() for _ in range(rng.randrange(CREDIT + 1))]
        if not failpoint:
            writer.kill()
        lines += writer.stdout.read().splitlines()
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        yield {key for line in lines for key in line.split() if len(key) == 32}


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_twenty_sigkills_lose_and_double_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    acknowledged: set[str] = set()
    for reported in killed_writers(path):
        acknowledged |= reported
        with Ledger.open(path) as ledger:
            assert not set(ledger.missing(acknowledged))
    assert 0 < len(acknowledged) < len(KEYS), "the kills fall into the middle of the work"
    out, _ = start_writer(path, 99).communicate()
    assert out.endswith("done\n")
    with Ledger.open(path) as ledger:
        assert len(ledger) == len(KEYS)
        write_records(tmp_path / "killed.parquet", ledger.traces(KEYS), Trace)
    with Ledger.open(tmp_path / "straight.sqlite") as ledger:
        ledger.add(trace(index) for index in range(len(KEYS)))
        write_records(tmp_path / "straight.parquet", ledger.traces(KEYS), Trace)
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "straight.parquet").read_bytes()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=8), st.randoms(use_true_random=False))
def test_any_order_of_adds_gives_one_sample_a_key(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], rng: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    expected = sorted({index for batch in batches for index in batch})
    keys = [KEYS[index] for index in expected]
    shuffled = rng.sample(batches, len(batches))
    for name, order in (("a", batches), ("b", shuffled)):
        with Ledger.open(folder / f"{name}.sqlite") as ledger:
            new = sum(ledger.add(trace(index) for index in batch) for batch in order)
            assert new == len(ledger) == len(expected)
            assert ledger.missing(KEYS[:31]) == [key for key in KEYS[:31] if key not in keys]
            assert list(ledger.traces(keys)) == [trace(index) for index in expected]
            write_records(folder / f"{name}.parquet", ledger.traces(keys), Trace)
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()
    assert read_records(folder / "a.parquet", Trace) == [trace(index) for index in expected]
    shutil.rmtree(folder)


def test_the_first_sample_of_a_key_stays(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        assert ledger.add([trace(1), trace(2)]) == 2
        assert ledger.add([trace(2, "another text"), trace(3)]) == 1
        assert [t.text for t in ledger.traces([KEYS[2]])] == [trace(2).text]


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        broken = trace(2).model_copy(update={"num_tokens": "many"})
        with pytest.raises(DataError):
            ledger.add([trace(1), broken])
        assert len(ledger) == 0
        assert ledger.add([trace(1)]) == 1


def test_a_second_writer_is_refused_and_the_lock_falls_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path), pytest.raises(DataError, match=rf"ledger\.sqlite: is being .* \(pid {os.getpid()}\)"):
        Ledger.open(path)
    writer = start_writer(path, 0)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    with pytest.raises(DataError, match=f"pid {writer.pid}"):
        Ledger.open(path)
    writer.kill()
    writer.communicate()
    with Ledger.open(path) as ledger:
        assert ledger.add([trace(1)]) in (0, 1)


def test_an_asked_for_sample_that_is_not_there_is_named(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l.sqlite") as ledger, pytest.raises(DataError, match=rf"l\.sqlite: {KEYS[9]}: has no"):
        list(ledger.traces([KEYS[9]]))


def filled(path: Path) -> Path:
    with Ledger.open(path) as ledger:
        ledger.add(trace(index) for index in range(600))
    return path


def test_a_torn_or_overwritten_file_is_a_data_error(tmp_path: Path) -> None:
    """Wherever the file is cut or scribbled on, it is refused by name or what is read is what was written."""
    whole = filled(tmp_path / "whole.sqlite").read_bytes()
    path, rng = tmp_path / "torn.sqlite", random.Random(3)
    refused, message = 0, ""
    for turn in range(60):
        at = rng.randrange(1, len(whole))
        path.write_bytes(whole[:at] if turn % 2 else whole[:at] + rng.randbytes(200) + whole[at + 200 :])
        try:
            with Ledger.open(path) as ledger:
                present = [key for key in KEYS[:600] if key not in set(ledger.missing(KEYS[:600]))]
                assert list(ledger.traces(present)) == [trace(int(key, 16)) for key in present]
        except DataError as exc:
            refused += 1
            message = str(exc)
        path.unlink()
        assert not message or message.startswith(f"{path}: ")
    assert refused > 30


def test_another_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (a)")
    with pytest.raises(DataError, match="not a ledger"):
        Ledger.open(path)
    assert sqlite3.connect(path).execute("SELECT name FROM sqlite_schema").fetchall() == [("mine",)]


def fill(ledger: Ledger) -> None:
    for index in range(1, 400):
        ledger.add([trace(index, "x" * 5_000)])


def test_a_full_disk_is_an_environment_fault_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger.open(path) as ledger:
        ledger.add([trace(0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            with pytest.raises(EnvironmentFault, match=r"l\.sqlite: .*run the same command again"):
                fill(ledger)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        stored = len(ledger)
        assert 0 < stored < 400
    with Ledger.open(path) as ledger:
        assert len(ledger) == stored
        assert ledger.add(trace(index) for index in range(400)) == 400 - stored


def test_tables_keep_every_field(tmp_path: Path) -> None:
    problems = [
        Problem(prompt="a", answer=None, grader="choice", source="s", metadata={"choices": ["x", {"y": 1}]}),
        Problem(prompt="ü\n\0", answer="1", grader="math", source="s"),
    ]
    assert write_records(tmp_path / "p.parquet", problems, Problem) == 2
    assert read_records(tmp_path / "p.parquet", Problem) == problems
    with pytest.raises(DataError, match=r"p\.parquet: key: no such column"):
        read_records(tmp_path / "p.parquet", Trace)
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        read_records(tmp_path / "none.parquet", Trace)
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"p\.parquet: not a readable Parquet file"):
        read_records(tmp_path / "p.parquet", Problem)
