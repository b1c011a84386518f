"""Hostile answers and hostile circumstances: none is graded right, none escapes, none outlives twice its time, none of
our own failures is the model's wrong answer; and the pool is what it was."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import EnvironmentFault
from distill.problems import load_problems
from distill.recipe import ReasoningGymSource, VerifyConfig
from distill.records import FinishReason, Problem
from distill.verify import open_verifier
from distill.verify.guards import EVALUATING
from distill.verify.keeper import Keeper
from distill.verify.pool import WorkerPool
from distill.verify.verifier import RuleVerifier
from tests.distill import hostile_answers as hostile

TIMEOUT_S = 3.0
Answer = tuple[Problem, str, FinishReason]


@pytest.fixture(params=["gmpy", "python"])
def arithmetic(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What sympy computes with in the workers: gmpy2, in whose loops no signal is heard, or Python's own integers."""
    if request.param == "gmpy":
        pytest.importorskip("gmpy2")
    else:
        (tmp_path / "shim").mkdir()
        (tmp_path / "shim/gmpy2.py").write_text("raise ImportError('not here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
    code = "from sympy.external.gmpy import GROUND_TYPES; print(GROUND_TYPES)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == request.param
    return str(request.param)


class Trap:
    """A file that must not appear and a port that must not be called."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "owned"
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def check(self) -> None:
        assert not self.path.exists()
        with pytest.raises(BlockingIOError):
            self._socket.accept()


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    trap = Trap(tmp_path)
    yield trap
    trap._socket.close()


def maths(reference: str) -> Problem:
    return Problem(prompt=hostile.QUESTION, answer=reference, grader="math", source="m")


def boxed(answer: str) -> str:
    return f"<think>\nso\n</think>\n\nThe answer is \\boxed{{{answer}}}."


def quick(trap: Trap) -> list[tuple[str, str]]:
    """(reference, completion)"""
    threes = [*hostile.injections(trap.path, trap.port), *hostile.BROKEN, *hostile.DISGUISED, *hostile.LISTS]
    return [
        *(("3", boxed(answer)) for answer in threes),
        *((reference, boxed(answer)) for reference, answer in hostile.OTHER_REFERENCES),
        *(("3", text) for text in hostile.COMPLETIONS),
    ]


def slow() -> list[tuple[str, str]]:
    return [("3", boxed(answer)) for answer in (*hostile.TOWERS, *hostile.LONG)]


def test_there_are_enough_and_all_are_different(trap: Trap) -> None:
    answers = quick(trap) + slow()
    assert len(set(answers)) == len(answers) >= 80


def battery(answers: list[tuple[str, str]], trap: Trap) -> None:
    with open_verifier(VerifyConfig(num_workers=1, timeout_s=TIMEOUT_S)) as verifier:
        assert isinstance(verifier, RuleVerifier)
        ((first),) = verifier.verify([(maths("3"), boxed("3.0"), "stop")])
        assert first.correct
        (keeper,) = verifier._pool.pids
        asked: list[Answer] = [(maths(reference), text, "stop") for reference, text in answers]
        # What is timed is an answer alone: the one worker is there, and takes them in their order.
        started = time.monotonic()
        for (problem, text, _), verdict in zip(asked, verifier.verify(asked), strict=True):
            taken, started = time.monotonic() - started, time.monotonic()
            assert taken < 2 * TIMEOUT_S, (taken, text[:60])
            assert verdict.state in ("wrong", "timeout", "infra_error"), (problem.answer, text[:60], verdict)
            trap.check()
        assert verifier._pool.pids == [keeper]
        wait_until(lambda: session_of(keeper) == {keeper})


@pytest.mark.timeout(300)
def test_no_quick_hostile_answer_passes_or_escapes(arithmetic: str, trap: Trap) -> None:
    battery([*quick(trap), *slow()[2::12]], trap)


@pytest.mark.torture
@pytest.mark.timeout(1_200)
def test_no_hostile_answer_passes_escapes_or_outlives_twice_its_time(arithmetic: str, trap: Trap) -> None:
    battery([*quick(trap), *slow()], trap)


@pytest.mark.timeout(200)
def test_no_scorer_that_evaluates_is_escaped_through(trap: Trap) -> None:
    families = [
        *(name.rpartition(".")[2] for name in EVALUATING),
        "simple_integration",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "countdown",
        "gcd",
    ]
    source = ReasoningGymSource(families={name: {} for name in families}, count=len(families), seed=1)
    asked: list[Answer] = [
        (problem, boxed(text), "stop")
        for problem in load_problems([source], base_dir=Path.cwd())
        for text in hostile.injections(trap.path, trap.port)
    ]
    with open_verifier(VerifyConfig(num_workers=2, timeout_s=2 * TIMEOUT_S)) as verifier:
        assert {verdict.state for verdict in verifier.verify(asked)} == {"wrong"}
    trap.check()


# --- the pool ---------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def session_of(pid: int) -> set[int]:
    """The processes, none of them a zombie, of the session that `pid` leads."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                found.add(int(folder.name))
    return found


def graders_of(keeper: Keeper) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(pid) for pid in Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()]
    return []


def honest(index: int) -> dict[str, object]:
    """The right answer, in words that have to be parsed."""
    return {"grader": "math", "reference": str(index), "answer": f"{index}.0", "metadata": {}}


def one_in_a_hundred_hangs(count: int, trap: Trap) -> None:
    tasks = [honest(index) for index in range(count)]
    for index in range(50, count, 100):
        tasks[index] |= {"answer": "(10^8)!"}
    pool = WorkerPool(num_workers=2, timeout_s=2.0, memory_bytes=1 << 30)
    results = pool.run(tasks)
    states = [next(results)[0]]
    wait_until(lambda: len(pool.pids) == 2)
    keepers = list(pool.pids)
    states += [state for state, _ in results]
    assert pool.pids == keepers  # not even replaced
    for keeper in keepers:
        wait_until(lambda keeper=keeper: session_of(keeper) == {keeper})  # type: ignore[misc]
    pool.close()
    assert [index for index, state in enumerate(states) if state != "correct"] == list(range(50, count, 100))
    assert {states[index] for index in range(50, count, 100)} <= {"timeout", "wrong"}
    assert not any(session_of(keeper) for keeper in keepers)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_pool_is_unchanged_after_500_answers_of_which_five_hang(trap: Trap) -> None:
    one_in_a_hundred_hangs(500, trap)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_the_pool_is_unchanged_after_10_000_answers_of_which_100_hang(trap: Trap) -> None:
    one_in_a_hundred_hangs(10_000, trap)


# --- failures that are not the model's --------------------------------------------------------------------------------

# In the keepers: a fork that the system refuses and a package that does not import, once for each flag that is put up.
SHIM = """
import errno, os, sys

FLAGS = {flags!r}

def lowered(name):
    try:
        os.unlink(os.path.join(FLAGS, name))
    except FileNotFoundError:
        return False
    return True

fork = os.fork

def refusing():
    if lowered("fork"):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()

os.fork = refusing

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "math_verify" and lowered("import"):
            raise ImportError("the disk is gone")

sys.meta_path.insert(0, Broken())
"""


class Saboteur:
    """Does something to a worker that is at work; each kind in turn."""

    def __init__(self, pool: WorkerPool, flags: Path) -> None:
        self.done: list[str] = []
        self._pool = pool
        self._flags = flags
        self._kinds = (
            self.kill_grader,
            self.kill_keeper,
            self.refuse_memory,
            self.talk_nonsense,
            self.break_pipe,
            self.refuse_fork,
            self.break_import,
        )

    def strike(self) -> None:
        kind = self._kinds[len(self.done) % len(self._kinds)]
        kind(next((keeper for keeper in self._pool._workers if keeper.chunk), self._pool._workers[0]))
        self.done.append(kind.__name__)

    def kill_grader(self, keeper: Keeper) -> None:
        for pid in graders_of(keeper):
            os.kill(pid, signal.SIGKILL)

    def kill_keeper(self, keeper: Keeper) -> None:
        os.kill(keeper.pid, signal.SIGKILL)

    def refuse_memory(self, keeper: Keeper) -> None:
        for pid in graders_of(keeper):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))

    def talk_nonsense(self, keeper: Keeper) -> None:
        ours = Path(f"/proc/self/fd/{keeper.out.fileno()}").readlink()
        with contextlib.suppress(FileNotFoundError):
            for descriptor in Path(f"/proc/{keeper.pid}/fd").iterdir():
                if descriptor.readlink() == ours:
                    descriptor.write_bytes(b'{"state": "wrong"}\n\x00\xff{"state": "wrong", "detail": ""}]\n')
                    return

    def break_pipe(self, keeper: Keeper) -> None:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), keeper.into.fileno())

    def refuse_fork(self, keeper: Keeper) -> None:
        (self._flags / "fork").touch()

    def break_import(self, keeper: Keeper) -> None:
        (self._flags / "import").touch()
        os.kill(keeper.pid, signal.SIGKILL)


def under_attack(strikes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = folder / "flags"
    flags.mkdir()
    (folder / "sitecustomize.py").write_text(SHIM.format(flags=str(flags)))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    pool = WorkerPool(num_workers=2, timeout_s=30, memory_bytes=1 << 30)
    saboteur = Saboteur(pool, flags)
    count = 300 + 60 * strikes
    results = []
    for result in pool.run([honest(index) for index in range(count)]):
        results.append(result)
        if len(results) >= 60 * (len(saboteur.done) + 1) and len(saboteur.done) < strikes:
            saboteur.strike()
    list(pool.run([honest(index) for index in range(300)]))  # what was put up last is met here
    assert len(pool.pids) == 2
    pool.close()
    assert len(saboteur.done) == strikes
    assert not list(flags.iterdir())
    assert len(results) == count
    assert {state for state, _ in results} <= {"correct", "infra_error"}
    # Nearly all are graded after all; an import that fails twice, or two strikes at one answer, cost a few.
    assert sum(state == "infra_error" for state, _ in results) <= 64 * strikes / 7


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_seven_failures_of_ours_are_nobodys_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_attack(7, tmp_path, monkeypatch)


@pytest.mark.timeout(120)
def test_processes_that_are_refused_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = subprocess.Popen, [3]

    def refusing(*arguments: Any, **options: Any) -> Any:
        if refusals[0]:
            refusals[0] -= 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", refusing)
    pool = WorkerPool(num_workers=2, timeout_s=30, memory_bytes=1 << 30)
    assert list(pool.run([honest(1), honest(2)])) == [("correct", "")] * 2
    pool.close()
    refusals[0] = 1_000
    pool = WorkerPool(num_workers=2, timeout_s=30, memory_bytes=1 << 30)
    with pytest.raises(EnvironmentFault, match="cannot start a process"):
        list(pool.run([honest(1)]))
    pool.close()


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_a_hundred_failures_of_ours_are_nobodys_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_attack(100, tmp_path, monkeypatch)
