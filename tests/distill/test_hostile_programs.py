"""The battery of hostile programs, at every level that this machine can make: none gets out, none passes, all end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import EnvironmentFault
from distill.recipe import CodeLimits
from distill.sandbox import LEVELS, Limits, Sandbox, SandboxedProgram, open_sandbox
from distill.verify.code.grader import CodeGrader
from tests.distill.hostile_programs import FUNCTIONS, WRITERS, Targets, filled_in
from tests.processes import below, children

LIMIT_S = 1.0
NUM_WORKERS = 3
SECRET = str(900_000_000_000 + secrets.randbelow(99_999_999_999))
PR_SET_CHILD_SUBREAPER = 36


class Recorded(Sandbox):
    """A sandbox that remembers the programs that were started in it."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox._cage, sandbox.passed_over)
        self.started: list[tuple[Limits, SandboxedProgram]] = []

    def start(self, source: Any, limits: Limits, modules: Any = None) -> SandboxedProgram:
        program = super().start(source, limits, modules)
        self.started.append((limits, program))
        return program


@pytest.fixture(params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Recorded:
    try:
        return Recorded(open_sandbox(request.param))
    except EnvironmentFault as exc:
        pytest.skip(str(exc))


class Loot:
    """What the programs are after, and how much of it they got."""

    def __init__(self, folder: Path) -> None:
        self.touched = 0
        self._folder = folder
        folder.chmod(0o777)
        planted = folder / "answer"
        planted.write_text(SECRET)
        planted.chmod(0o644)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        self._sockets = [
            self._listening(socket.AF_INET, ("127.0.0.1", 0)),
            self._listening(socket.AF_UNIX, str(folder / "socket")),
            self._listening(socket.AF_UNIX, f"\0{folder.name}"),
        ]
        (folder / "socket").chmod(0o777)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 0))
        self._sockets.append(datagrams)
        threading.Thread(target=self._answer, args=(datagrams,), daemon=True).start()
        self.victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.targets = Targets(
            planted=planted,
            folder=folder / "open",
            tcp=self._sockets[0].getsockname()[1],
            udp=datagrams.getsockname()[1],
            unix=folder / "socket",
            abstract=folder.name,
            victim=self.victim.pid,
            parent=os.getpid(),
        )

    def _listening(self, family: int, address: Any) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(16)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = listener.accept()
                self.touched += 1
                stream.sendall(SECRET.encode())
                stream.close()

    def _answer(self, datagrams: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, sender = datagrams.recvfrom(64)
                if sender is None:  # woken by the end
                    return
                self.touched += 1
                datagrams.sendto(SECRET.encode(), sender)

    def check(self) -> None:
        assert self.victim.poll() is None
        assert self.touched == 0
        assert self.targets.planted.read_text() == SECRET
        assert self.targets.planted.stat().st_mode & 0o777 == 0o644
        assert list(self.targets.folder.iterdir()) == []
        assert self.targets.folder.stat().st_mode & 0o777 == 0o777
        for folder in ("/tmp", "/dev/shm", "/"):
            assert not list(Path(folder).glob("potstill-escape*"))

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
            one.close()
        self.victim.communicate(b"\n")


@pytest.fixture
def loot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loot]:
    monkeypatch.setenv("POTSTILL_CANARY", SECRET)
    folder = Path(tempfile.mkdtemp(prefix="potstill-loot-"))  # not pytest's own: that one is closed to other users
    loot = Loot(folder)
    yield loot
    loot.close()
    shutil.rmtree(folder)


@pytest.fixture
def orphans() -> Iterator[None]:
    """Processes that lose their parent become children of this one, so that `children` sees them."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def problem(name: str, *, expected: str) -> dict[str, Any]:
    if name in WRITERS:
        return {"cases": [{"input": "3\n", "output": SECRET}]}
    tests = f"def check(candidate):\n    assert candidate(3) == {expected}\n"
    return {"tests": tests, "entry_point": "f"}


def test_no_hostile_program_escapes_passes_or_stays(sandbox: Recorded, loot: Loot, orphans: None) -> None:
    before = below(os.getpid())
    programs = {name: filled_in(source, loot.targets) for name, source in (FUNCTIONS | WRITERS).items()}
    assert len(programs) >= 60
    # The expected value is the secret, or the word that only a program says that got what it must not have.
    tasks = [
        (problem(name, expected="'escaped'" if "'escaped'" in source else SECRET), source)
        for name, source in programs.items()
    ]
    limits = CodeLimits(timeout_s=LIMIT_S, memory_mib=256, output_mib=1, num_threads=8)
    grader = CodeGrader(limits, num_workers=NUM_WORKERS, sandbox=sandbox)
    try:
        results = dict(zip(programs, grader.run(tasks), strict=True))
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("code-grader")]
        assert len(names) == NUM_WORKERS
    finally:
        grader.close()
    assert {name: result for name, result in results.items() if result[0] not in ("wrong", "timeout")} == {}
    loot.check()
    # What others have started here may end meanwhile, or lose its parent: it was below this process before.
    assert children(os.getpid()) <= before
    over = [program.wall_s for limits, program in sandbox.started if program.wall_s > 2 * limits.wall_s]
    assert over == []


def test_honest_programs_pass_where_hostile_ones_do_not(sandbox: Recorded) -> None:
    grader = CodeGrader(CodeLimits(timeout_s=60.0), num_workers=2, sandbox=sandbox)
    honest = f"import threading, asyncio, json, re, collections\ndef f(x):\n    return {SECRET}\n"
    tasks = [(problem("f", expected=SECRET), honest), (problem("huge_stdout", expected=""), f"print({SECRET})")]
    try:
        assert list(grader.run(tasks)) == [("correct", "")] * 2
    finally:
        grader.close()


def test_the_loot_is_there_to_be_taken(loot: Loot) -> None:
    """Outside a sandbox the thieves succeed: the battery above tests something."""
    taken = {}
    for name in ("tcp", "udp", "unix", "abstract_unix", "planted_answer", "own_environment"):
        names: dict[str, Any] = {}
        exec(filled_in(FUNCTIONS[name], loot.targets), names)
        taken[name] = str(names["f"](3))
    assert set(taken.values()) == {SECRET}
    deadline = time.monotonic() + 30
    while loot.touched < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loot.touched == 4
