"""A stage is complete when its manifest is there: what reruns, what does not, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill import manifest as manifest_module
from distill.errors import EnvironmentFault
from distill.failpoints import VARIABLE
from distill.manifest import (
    MANIFEST,
    StageRun,
    current,
    environment_faults,
    hash_file,
    read_manifest,
    run_stage,
    write_atomically,
)
from distill.records import Trace
from distill.tables import write_records
from tests.repository import REPOSITORY


class Stage:
    """Copies its input, and counts how often it really ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "in.txt"
        self.source.write_text("one")
        self.out = folder / "out"
        self.config: dict[str, Any] = {"lr": 1e-4}
        self.runs = 0

    def run(self, body: Callable[[], None] = lambda: None) -> Any:
        def whole() -> dict[str, int]:
            self.runs += 1
            body()
            write_atomically(self.out / "copy.txt", self.source.read_text())
            return {"bytes": 3}

        return run_stage("copy", {"in": self.source}, self.config, self.out, whole, ["copy.txt"])

    def current(self) -> bool:
        return current("copy", {"in": self.source}, self.config, self.out) is not None


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_seconds_begin_where_the_stage_does_not_where_its_body_does(tmp_path: Path) -> None:
    stage_run = StageRun("x", {}, {}, tmp_path / "out")
    time.sleep(0.05)  # a teacher is opened, say
    assert stage_run.run(dict, []).seconds >= 0.05


def test_a_complete_stage_does_not_run_again(stage: Stage) -> None:
    assert not stage.current()
    first = stage.run()
    assert stage.current()
    assert stage.run() == first == read_manifest(stage.out)
    assert stage.runs == 1
    assert first.counts == {"bytes": 3}
    assert first.outputs == {"copy.txt": hash_file(stage.source)}


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: stage.source.write_text("two"),
        lambda stage: stage.config.update(lr=2e-4),
        lambda stage: stage.config.update(more=None),
        lambda stage: (stage.out / "copy.txt").write_text("tampered"),
        lambda stage: (stage.out / "copy.txt").unlink(),
        lambda stage: (stage.out / MANIFEST).unlink(),
        lambda stage: (stage.out / MANIFEST).write_text((stage.out / MANIFEST).read_text()[:-20]),
        lambda stage: (stage.out / MANIFEST).write_text("[]"),
    ],
)
def test_whatever_changed_makes_it_run_again_once(stage: Stage, change: Callable[[Stage], object]) -> None:
    stage.run()
    change(stage)
    assert not stage.current()
    stage.run()
    stage.run()
    assert stage.runs == 2
    assert (stage.out / "copy.txt").read_text() == stage.source.read_text()


def test_a_stage_in_two_steps_reads_its_inputs_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.run()
    stage.config["lr"] = 2e-4
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(manifest_module, "hash_file", counted)
    stage_run = StageRun("copy", {"in": stage.source}, stage.config, stage.out)
    assert stage_run.current() is None
    done = stage_run.run(lambda: {"bytes": 3}, ["copy.txt"])
    assert read.count(stage.source) == 1
    assert stage_run.current() == done
    assert read.count(stage.source) == 1


def test_touching_and_moving_without_change_runs_nothing(stage: Stage) -> None:
    stage.run()
    os.utime(stage.source)
    stage.config = dict(reversed(stage.config.items()))
    assert stage.current()
    moved = stage.folder / "elsewhere"
    stage.out.rename(moved)
    stage.out = moved
    stage.run()
    assert stage.runs == 1


def test_a_stage_that_fails_is_not_complete_even_if_it_was(stage: Stage) -> None:
    stage.run()
    stage.source.write_text("two")

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(fail)
    assert read_manifest(stage.out) is None
    stage.run()
    assert (stage.out / "copy.txt").read_text() == "two"


def test_folders_hash_by_names_and_bytes_without_manifests(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_text("x")
        (tmp_path / name / "y").write_text("y")
    (tmp_path / "b" / MANIFEST).write_text("not counted")
    assert hash_file(tmp_path / "a") == hash_file(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")


# --- kills ------------------------------------------------------------------------------------------------------------

WRITER = """
    import sys
    from pathlib import Path
    from distill.manifest import atomic_file, write_atomically
    path = Path(sys.argv[1])
    write_atomically(path, b"a" * 300_000)
    with atomic_file(path) as file:
        file.write(b"b" * 150_000)
        file.flush()
        print("half", flush=True)
        sys.stdin.read()
        file.write(b"b" * 150_000)
"""


def child(code: str, *arguments: str, failpoint: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), VARIABLE: failpoint},
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("place", "left"), [("half", b"a"), ("file.written:2", b"a"), ("file.renamed:2", b"b"), ("", b"b")]
)
def test_a_kill_leaves_the_old_file_or_the_new_one_whole(tmp_path: Path, place: str, left: bytes) -> None:
    writer = child(WRITER, str(tmp_path / "file"), failpoint=place)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    if place == "half":
        writer.kill()
    writer.communicate()
    assert writer.returncode == (-signal.SIGKILL if place else 0)
    assert (tmp_path / "file").read_bytes() == left * 300_000


STAGE = """
    import sys
    from pathlib import Path
    from distill.manifest import run_stage, write_atomically
    folder = Path(sys.argv[1])
    def body():
        for part in range(20):
            if not (folder / "out" / f"{part}.txt").exists():
                write_atomically(folder / "out" / f"{part}.txt", f"part {part}")
        return {}
    run_stage("parts", {"in": folder / "in.txt"}, {}, folder / "out", body, [f"{n}.txt" for n in range(20)])
"""
KILLS = ("stage.begun", "file.written:5", "file.renamed:7", "stage.ended", "file.written:1")  # the last: the manifest


@pytest.mark.timeout(120)
def test_a_killed_stage_is_incomplete_and_its_rerun_equals_a_straight_one(tmp_path: Path) -> None:
    outputs = []
    for name, kills in (("killed", KILLS), ("straight", ())):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "in.txt").write_text("x")
        for place in kills:
            assert child(STAGE, str(folder), failpoint=place).wait() == -signal.SIGKILL
            assert read_manifest(folder / "out") is None
        assert child(STAGE, str(folder)).wait() == 0
        manifest = read_manifest(folder / "out")
        assert manifest is not None
        outputs.append((manifest.fingerprint, manifest.outputs))
    assert outputs[0] == outputs[1]


# --- full disks -------------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with file_size_limit(1_000), pytest.raises(EnvironmentFault, match="file: File too large; free it and run"):
        write_atomically(path, "n" * 5_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_a_table_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rng = random.Random(1)
    traces = [
        Trace(
            key=str(n),
            problem_id="p",
            sample_index=n,
            text=rng.randbytes(2_000).hex(),
            finish_reason="stop",
            num_prompt_tokens=1,
            num_tokens=1,
            teacher="t",
        )
        for n in range(200)
    ]
    write_records(path, traces[:1], Trace)
    before = path.read_bytes()
    with file_size_limit(50_000), pytest.raises(EnvironmentFault, match=r"t\.parquet: File too large"):
        write_records(path, traces, Trace)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, where this machine lets us mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_ends_a_stage_which_goes_on_when_there_is_room(small_disk: Path) -> None:
    stage = Stage(small_disk)
    ballast = small_disk / "ballast"
    with pytest.raises(EnvironmentFault, match="No space left on device") as caught:
        stage.run(lambda: ballast.write_bytes(b"x" * 2**20) and None)
    assert caught.value.exit_code == 3
    assert read_manifest(stage.out) is None
    ballast.unlink()
    stage.run()
    assert stage.current()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_machine_lacks_is_exit_three(number: int) -> None:
    with pytest.raises(EnvironmentFault) as caught, environment_faults("here"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.exit_code, caught.value.where) == (3, "here")


def test_what_is_a_defect_stays_one() -> None:
    with pytest.raises(FileNotFoundError), environment_faults("here"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_manifest_says_what_was_run(stage: Stage) -> None:
    stage.run()
    manifest = json.loads((stage.out / MANIFEST).read_text())
    assert manifest["inputs"] == {"in": hash_file(stage.source)}
    assert manifest["config"] == {"lr": 1e-4}
    assert manifest["versions"]["math-verify"] == "0.9.0"
    assert manifest["peak_rss_bytes"] > 2**20
