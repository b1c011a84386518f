"""The box of hostile files (`tests.hostile`) through every command that opens their kind.

One line, exit 2 or 3, no code run, nothing written, under 2 GB and 20 s of processor time each. The commands run as
forks of a process that has imported what they need; a dozen of the files are given to commands that start as a person
starts them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.hostile.box import CASES, DOCTOR, TRAP, Case
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, make_world, tree_of, write_yaml
from tests.repository import REPOSITORY

# By the clock a machine that does other things may take as long as it likes; what waits for ever is killed.
MOST_CPU_S, MOST_BYTES = 20.0, 2 * 10**9
TIMEOUT_S = 240.0
YES = "y\n" * 1_000
# Starts a command and writes what it took: one that this process starts would be counted this process's pages too.
MEASURED = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
took = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10]
open(sys.argv[1], "w").write(json.dumps(took))
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    cpu_s: float
    peak_bytes: int


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy") / "world"
    folder.mkdir()
    make_world(folder)
    job = {"name": "job", "launcher": "torchrun", "job": "generate", "recipe": "recipe.yaml", "workdir": str(folder)}
    write_yaml(folder / "job.yaml", job)
    return folder


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """A copy to harm, whose files name the copy's."""
    folder = shutil.copytree(world, tmp_path / "world")
    for name in ("recipe.yaml", "student.yaml", "job.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(str(world), str(folder)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.pipelines.forked_commands"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=ENVIRONMENT
    ) as process:
        assert _pipe(process.stdout).readline() == '"ready"\n'
        yield process
        _pipe(process.stdin).close()


def forked(forks: subprocess.Popen[str], arguments: tuple[str, ...], world: Path) -> Outcome:
    _pipe(forks.stdin).write(json.dumps({"arguments": arguments, "cwd": str(world)}) + "\n")
    _pipe(forks.stdin).flush()
    outcome = json.loads(_pipe(forks.stdout).readline())
    out, err = (Path(f"{world}.{name}").read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return Outcome(outcome["code"], out, err, outcome["cpu_s"], outcome["peak_bytes"])


def started(arguments: tuple[str, ...], world: Path) -> Outcome:
    """A process of its own, whose memory is asked of the kernel."""
    took = Path(f"{world}.took")
    measured = [sys.executable, "-I", "-S", "-c", MEASURED, str(took), *COMMAND, *arguments]
    ran = subprocess.run(
        measured, cwd=world, env=ENVIRONMENT, input=YES, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    code, cpu_s, peak_bytes = json.loads(took.read_text())
    return Outcome(code, ran.stdout, ran.stderr, cpu_s, peak_bytes)


def assert_refused(case: Case, arguments: tuple[str, ...], outcome: Outcome) -> None:
    said = outcome.out + outcome.err
    assert outcome.code in (2, 3), said
    assert "Traceback" not in said
    assert case.says in said
    if arguments == DOCTOR:
        assert outcome.err == ""
    else:
        lines = [line for line in outcome.err.splitlines() if not line.startswith("  ")]  # others say how it stands
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("potstill: ")
    assert outcome.peak_bytes < MOST_BYTES
    assert outcome.cpu_s < MOST_CPU_S


FILES = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]
OF_DOCTOR = [pytest.param(case, id=case.name) for case in CASES if DOCTOR in case.commands]
# One of each kind, and those that took memory or time.
IN_EARNEST = {
    *("auto-map", "auto-map-of-a-tokenizer", "pickled-weights", "a-billion-layers", "config-without-end", "a-loop"),
    *("a-long-text", "a-tokenizer-that-grows", "deep-recipe", "recipe-of-aliases", "deep-student", "job-as-a-pipe"),
    *("a-line-of-gigabytes", "a-billion-blank-lines", "a-text-named-often", "a-page-of-a-gigabyte"),
    *("a-benchmark-without-end", "a-ledger-with-a-view"),
}


def test_the_box_is_full() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES) >= 60
    assert names >= IN_EARNEST


def test_the_healthy_world_passes(forks: subprocess.Popen[str], own_world: Path) -> None:
    """Else whatever is refused below might be refused for another reason."""
    checked = forked(forks, DOCTOR, own_world)
    assert checked.code == 0, checked.out + checked.err


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_refused_in_one_line(forks: subprocess.Popen[str], own_world: Path, case: Case) -> None:
    case.make(own_world)
    before = tree_of(own_world)
    for arguments in set(case.commands) - {DOCTOR}:
        assert_refused(case, arguments, forked(forks, arguments, own_world))
        assert not (own_world / TRAP).exists()
    # Locks stay; a data set is asked for only when its run has begun.
    begun = ("other.sqlite.lock", "runs/tiny-world/.lock", "runs/tiny-world/recipe.yaml")
    assert {name: seen for name, seen in tree_of(own_world).items() if name not in begun} == before


@pytest.mark.slow  # doctor looks at the machine too, which takes its second
@pytest.mark.parametrize("case", OF_DOCTOR)
def test_doctor_names_it(forks: subprocess.Popen[str], own_world: Path, case: Case) -> None:
    case.make(own_world)
    before = tree_of(own_world)
    assert_refused(case, DOCTOR, forked(forks, DOCTOR, own_world))
    assert tree_of(own_world) == before
    assert not (own_world / TRAP).exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in IN_EARNEST])
def test_it_is_so_in_processes_of_their_own(own_world: Path, case: Case) -> None:
    case.make(own_world)
    for arguments in case.commands:
        assert_refused(case, arguments, started(arguments, own_world))
        assert not (own_world / TRAP).exists()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
