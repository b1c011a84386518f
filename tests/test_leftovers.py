"""A run of tests names the test that leaves a process behind, and ends what was left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import _is_alive
from tests.repository import REPOSITORY

TESTS = """
import subprocess, sys, time
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]

def test_tidy():
    with subprocess.Popen(SLEEP) as process:
        process.kill()

def test_child(tmp_path_factory):
    note(subprocess.Popen(SLEEP).pid)

def test_orphan():
    code = "import subprocess, sys; print(subprocess.Popen(%r, stdout=-3, start_new_session=True).pid)" % SLEEP
    note(subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout)

def note(pid):
    with open("PIDS", "a") as file:
        file.write(f"{int(pid)}\\n")
"""


@pytest.fixture
def run(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    hurried = "import tests.leftovers\n\ntests.leftovers.GRACE_S = 0.2\n"
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests/conftest.py").read_text() + hurried)
    (tmp_path / "test_some.py").write_text(TESTS.replace("PIDS", str(tmp_path / "pids")))
    return subprocess.run(
        # Without a summary: it repeats what it does not shorten, and it shortens nothing where CI is set.
        [sys.executable, "-m", "pytest", "-qrN", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_test_is_named_and_the_process_ended(run: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    left = [line.split(":")[0] for line in run.stdout.splitlines() if "time.sleep(600)" in line]
    assert run.returncode == 1
    assert len(left) == len(pids) == 2
    assert f"{pids[0]} of test_some.py" in left[0]
    assert "::test_child" in run.stdout
    assert "::test_orphan" in run.stdout
    assert "::test_tidy" not in run.stdout
    assert not any(map(_is_alive, pids)), [os.kill(pid, signal.SIGKILL) for pid in pids]
