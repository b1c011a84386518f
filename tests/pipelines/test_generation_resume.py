"""Generation through the command line on a machine that fails: a full disk, a kill, a stop. The traces are the same."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.records import Trace
from distill.tables import read_records
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, make_world, potstill, without_progress
from tests.repository import REPOSITORY

MANY = ("--set", "generate.num_samples=14", "--set", "teacher.batch_size=4")  # 336 samples


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    out = tmp_path_factory.mktemp("uninterrupted")
    result = potstill("generate", recipe, *MANY, "--out", out)
    assert result.returncode == 0, result.stderr
    return traces(out)


def traces(out: Path) -> list[Trace]:
    return read_records(out / "tiny-world/generate/traces", Trace)


def num_samples(ledger: Path) -> int:
    """How many samples are committed, as another process sees it while the first one writes."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM traces").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet, or without its table
        return 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_full_disk_is_exit_3_and_resumable(recipe: Path, small_disk: Path, uninterrupted: list[Trace]) -> None:
    full = potstill("generate", recipe, *MANY, "--out", small_disk)
    assert full.returncode == 3, full.stderr
    assert without_progress(full.stderr).count("\n") == 1
    assert "again" in full.stderr
    assert not (small_disk / "tiny-world/generate/manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    again = potstill("generate", recipe, *MANY, "--out", small_disk)
    assert again.returncode == 0, again.stderr
    assert traces(small_disk) == uninterrupted


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("SIGKILL", -signal.SIGKILL),
        pytest.param("SIGTERM", 75, marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_stopped_generation_goes_on(
    recipe: Path, tmp_path: Path, uninterrupted: list[Trace], sent: str, code: int
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", str(recipe), *MANY, "--out", str(tmp_path)],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    ledger = tmp_path / "tiny-world/generate/ledger.sqlite"
    until = time.monotonic() + 240
    while not num_samples(ledger):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(getattr(signal, sent))
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert without_progress(err).count("\n") == (0 if sent == "SIGKILL" else 1), err
    assert not (tmp_path / "tiny-world/generate/manifest.json").exists()
    again = potstill("generate", recipe, *MANY, "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    reused = int(again.stdout.partition("reused ")[2].split(",")[0])
    assert 0 < reused < len(uninterrupted)
    assert traces(tmp_path) == uninterrupted
