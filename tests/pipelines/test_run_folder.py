"""A run's folder that cannot be written, or is in use: one line before weights are read, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, EnvironmentFault
from distill.ledger import Ledger
from pipelines import chain
from pipelines.chain import prepare
from pipelines.context import Context
from pipelines.run_folder import LOCK, check_writable, held
from pipelines.stages.generate import generate
from tests.distill.test_manifest import file_size_limit
from tests.pipelines.test_chain import recipe
from tests.repository import REPOSITORY

# Not writable for root either: sysfs has no files of others.
READ_ONLY = Path("/sys/kernel")
NATIVE = {"backend": "native", "model": "teacher/pico"}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(chain, "check_weights", refuse)


def take(command: str, run_dir: Path, **changes: Any) -> None:
    list(prepare(command, recipe(teacher=NATIVE, **changes), run_dir, Context(REPOSITORY)))


def test_a_file_in_the_way_is_the_users_to_move(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("notes")
    with pytest.raises(DataError, match=r"runs: is not a folder: nothing can be written there$"):
        take("generate", tmp_path / "runs" / "chained")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "generate").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"r/generate: is not a folder"):
        take("generate", tmp_path / "r")


@pytest.mark.parametrize("below", [".", "runs/chained"])
def test_a_folder_that_is_read_only_is_the_machines(below: str) -> None:
    with pytest.raises(EnvironmentFault, match=r"/sys/kernel.*: .*; make it writable and run the same command again"):
        take("run", READ_ONLY / below)


@pytest.mark.parametrize("inner", ["generate", "distill/x-distilled"])
def test_folders_within_are_tried_too(tmp_path: Path, inner: str) -> None:
    place = tmp_path / "run" / inner
    place.parent.mkdir(parents=True)
    place.symlink_to(READ_ONLY)
    with pytest.raises(EnvironmentFault, match=rf"run/{inner}.*; make it writable"):
        take("run", tmp_path / "run")


def test_a_full_disk_shows_beforehand(tmp_path: Path) -> None:
    with (
        file_size_limit(1_000),
        pytest.raises(EnvironmentFault, match=r"run: File too large; free it and run the same"),
    ):
        take("generate", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from pipelines.run_folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_command_is_at_work_in_is_refused_until_that_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match=r"run: is being written by another process$"):
            take("generate", run_dir)
        with pytest.raises(DataError, match="is being written by another process"), held(run_dir):
            pass
    finally:
        other.kill()
        other.wait()
    before = (run_dir / LOCK).stat()
    with held(run_dir):
        assert (run_dir / LOCK).stat() == before
    with pytest.raises(AssertionError, match="weights were read"):
        take("generate", run_dir)


def test_a_ledger_in_use_shows_before_the_teacher_is_opened(tmp_path: Path) -> None:
    def refuse(config: object) -> Any:
        raise AssertionError("the teacher was opened")

    context = Context(tmp_path, open_teacher=refuse)
    asked = recipe(teacher={"backend": "openai", "model": "served"})
    with (
        Ledger.open(tmp_path / "run" / "generate" / "ledger.sqlite"),
        pytest.raises(DataError, match=r"ledger\.sqlite: is being written by another process"),
    ):
        generate(asked, tmp_path / "run", context)
    with pytest.raises(AssertionError, match="opened"):
        generate(asked, tmp_path / "run", context)


@pytest.mark.parametrize("command", ["push", "push-traces"])
def test_a_push_without_a_token_says_so_before_anything(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(EnvironmentFault, match=r"Hub: no token to push with; set HF_TOKEN or run `hf auth login`"):
        take(command, tmp_path / "run")
    with pytest.raises(DataError, match=r"not there yet; run `potstill"):
        prepare(command, recipe(), tmp_path / "run", Context(REPOSITORY, dry_run=True))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_any")
    with pytest.raises(DataError, match=r"not there yet; run `potstill"):
        take(command, tmp_path / "run")
    assert not list(tmp_path.iterdir())
