"""The sandbox: what a program may do, how its end is told, and that a level which does not hold is not used."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distill.errors import EnvironmentFault
from distill.sandbox import LEVELS, Level, Limits, Sandbox, SandboxFailure, open_sandbox
from distill.sandbox.filter import ALLOW, ERRNO, KILL, LOOKED_AT, MACHINES, NAMESPACES, NUMBERS, OWN_PID, build_filter
from distill.sandbox.levels import Unavailable, build_cage

ROOMY = Limits(wall_s=60.0, cpu_s=60.0, memory_bytes=1 << 30, output_bytes=1 << 20, num_threads=8)


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return open_sandbox(request.param)
    except EnvironmentFault as exc:
        pytest.skip(str(exc))


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_has_its_input_its_library_and_its_exit_status(sandbox: Sandbox) -> None:
    source = """
        import collections, concurrent.futures, dataclasses, decimal, heapq, itertools, json, math, random, re, sys
        @dataclasses.dataclass
        class Point:
            x: int
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            total = sum(pool.map(int, sys.stdin.read().split()))
        print(total, Point(1), __name__, sys.argv)
        print("noise", file=sys.stderr)
        if __name__ == "__main__":
            exit(3)
    """
    outcome = sandbox.run(textwrap.dedent(source), b"1 2\n3", ROOMY)
    assert (outcome.how, outcome.exit_code) == ("exit", 3)
    assert outcome.stdout == b"6 Point(x=1) __main__ ['program']\n"
    assert outcome.stderr == b"noise\n"


def test_input_and_output_larger_than_any_pipe(sandbox: Sandbox) -> None:
    data = b"x" * 900_000
    outcome = sandbox.run("import sys; sys.stdout.write(sys.stdin.read())", data, ROOMY)
    assert (outcome.how, outcome.exit_code, outcome.stdout) == ("exit", 0, data)
    assert sandbox.run("print(1)", data * 4, ROOMY).stdout == b"1\n"  # and input that nobody reads


def test_a_crash_is_an_exit_status_and_a_traceback(sandbox: Sandbox) -> None:
    outcome = sandbox.run("def f(): return 1 / 0\nf()", b"", ROOMY)
    assert (outcome.how, outcome.exit_code) == ("exit", 1)
    assert outcome.stderr.rstrip().endswith(b"ZeroDivisionError: division by zero")
    assert sandbox.run("x = (", b"", ROOMY).stderr.rstrip().endswith(b"SyntaxError: '(' was never closed")


def test_the_same_program_gives_the_same_output_every_time(sandbox: Sandbox) -> None:
    source = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('potstill'))"
    assert sandbox.run(source, b"", ROOMY).stdout == sandbox.run(source, b"", ROOMY).stdout


@pytest.mark.parametrize(
    ("source", "changes", "how"),
    [
        ("import time; time.sleep(10000)", {"wall_s": 0.3}, "wall_time"),
        ("while True: pass", {"cpu_s": 1.0}, "cpu_time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", {"cpu_s": 1.0}, "cpu_time"),
        ("while True: print('y' * 1000)", {"output_bytes": 50_000}, "output"),
        ("import sys\nwhile True: sys.stderr.write('y' * 1000)", {"output_bytes": 50_000}, "output"),
        ("import os, time\nos.closerange(0, 64)\ntime.sleep(10000)", {"wall_s": 0.3}, "wall_time"),
    ],
)
def test_each_limit_ends_a_program(sandbox: Sandbox, source: str, changes: dict[str, float], how: str) -> None:
    limits = dataclasses.replace(ROOMY, **changes)
    outcome = sandbox.run(source, b"", limits)
    assert outcome.how == how
    assert len(outcome.stdout) <= limits.output_bytes
    assert len(outcome.stderr) <= limits.output_bytes


def test_memory_ends_where_it_is_told_to(sandbox: Sandbox) -> None:
    source = "a = []\ntry:\n    while True: a.append(bytearray(1 << 24))\nexcept MemoryError: print(len(a))"
    most = [
        int(sandbox.run(source, b"", dataclasses.replace(ROOMY, memory_bytes=megabytes << 20)).stdout) * 16
        for megabytes in (256, 768)
    ]
    assert 64 < most[0] < 256
    assert 512 < most[1] < 768


def test_a_conversation_line_by_line(sandbox: Sandbox) -> None:
    program = sandbox.start("while True: print(input()[::-1], flush=True)", ROOMY)
    assert [program.exchange(line) for line in (b"abc", b"", b"x" * 300_000)] == [b"cba", b"", b"x" * 300_000]
    program.kill()
    program.kill()
    ended = sandbox.start("input()", ROOMY)
    assert ended.exchange(b"x") is None
    assert ended.finish().exit_code == 0


# --- levels -----------------------------------------------------------------------------------------------------------


ALLOW_ALL = {"filter": struct.pack("<HBBI", 0x06, 0, 0, ALLOW), "own_pid": ()}
WEAKER = [
    (ALLOW_ALL, "(fork|become another program)"),
    ({"new_user": False}, "be root"),
    ({"landlock_abi": 0}, "read a file"),
]


@pytest.mark.parametrize(("change", "complaint"), WEAKER)
def test_a_level_that_does_not_hold_is_refused_with_what_got_out(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], complaint: str
) -> None:
    """Take one part of the cage away: the probe gets out, and the level is not used."""
    import distill.sandbox as package

    if all(sandbox._cage.setup[name] == value for name, value in change.items()):
        pytest.skip("this level does without that part here")

    def weak(level: Level) -> package.Cage:
        cage = build_cage(level)
        return dataclasses.replace(cage, setup=cage.setup | change)

    monkeypatch.setattr(package, "build_cage", weak)
    with pytest.raises(EnvironmentFault, match=f"does not hold: a program could .*{complaint}"):
        open_sandbox(sandbox.level)


def test_without_any_level_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill.sandbox as package

    def unavailable(level: str) -> package.Cage:
        raise Unavailable(f"no {level} here")

    monkeypatch.setattr(package, "build_cage", unavailable)
    with pytest.raises(EnvironmentFault, match=r"no bubblewrap here.*no landlock here.*install bubblewrap"):
        open_sandbox()


def test_a_weaker_level_says_why_the_stronger_is_not_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill.sandbox.levels as levels

    monkeypatch.setattr(levels.shutil, "which", lambda name: None)
    try:
        sandbox = open_sandbox()
    except EnvironmentFault as exc:
        pytest.skip(str(exc))
    assert sandbox.level == "landlock"
    assert "apt-get install bubblewrap" in sandbox.passed_over["bubblewrap"]


def test_a_sandbox_that_does_not_come_up_is_no_word_about_the_program(sandbox: Sandbox) -> None:
    cage = sandbox._cage
    broken = Sandbox(dataclasses.replace(cage, setup=cage.setup | {"filter": b"\0" * 8}), {})
    with pytest.raises(SandboxFailure, match="does not start: sandbox: OSError"):
        broken.run("print(1)", b"", ROOMY)
    missing = Sandbox(dataclasses.replace(cage, command=("/no/such/program",)), {})
    with pytest.raises(SandboxFailure, match="cannot be started"):
        missing.run("print(1)", b"", ROOMY)


def test_a_program_dies_with_the_process_that_started_it(sandbox: Sandbox, tmp_path: Path) -> None:
    """The parent is killed the hard way; its program, which holds one end of a pipe, must let go of it."""
    code = f"""
        import os, signal, sys
        from distill.sandbox import Limits, open_sandbox
        sandbox = open_sandbox({sandbox.level!r})
        limits = Limits(wall_s=600, cpu_s=600, memory_bytes=1 << 30, output_bytes=1 << 20, num_threads=8)
        program = sandbox.start("import time\\nprint(1, flush=True)\\ntime.sleep(10000)", limits)
        program.exchange(b"")
        print(program._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert parent.returncode == -9
    status = Path(f"/proc/{int(parent.stdout)}/stat")

    def gone() -> bool:
        try:
            return status.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    deadline = time.monotonic() + 60
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone()


# --- the filter -------------------------------------------------------------------------------------------------------

OFFSETS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Run the filter as the kernel would: an interpreter for the few instructions that it is made of."""
    program, own_pid = build_filter(machine)
    code = bytearray(program)
    for offset in own_pid:
        code[offset : offset + 4] = struct.pack("<I", 4321)
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, OFFSETS[machine] if arch is None else arch, 0, *words)
    accumulator, at = 0, 0
    while True:
        operation, true, false, value = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        else:
            holds = {0x15: accumulator == value, 0x45: bool(accumulator & value), 0x35: accumulator >= value}[operation]
            at += true if holds else false


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_lets_through_what_it_lists_and_nothing_else(machine: str) -> None:
    column = MACHINES[machine]
    plain = {numbers[column] for numbers in NUMBERS.values()} - {None}
    special = {numbers[column] for numbers, _, _ in LOOKED_AT.values()} | {n[column] for n in OWN_PID.values()}
    clone, clone3 = ((56, 435), (220, 435))[column]
    for number in range(600):
        expected = ALLOW if number in plain else ERRNO | (38 if number == clone3 else 1)
        if number not in special | {clone}:
            assert verdict(machine, number, 7, 99_999) == expected, number
    assert verdict(machine, 0, arch=0x40000003) == KILL
    if machine == "x86_64":
        assert verdict(machine, 0x40000000 + 39) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_looks_at_arguments(machine: str) -> None:
    column = MACHINES[machine]
    clone = (56, 220)[column]
    thread = 0x3D0F00  # what glibc starts a thread with
    assert verdict(machine, clone, thread) == ALLOW
    assert verdict(machine, clone, 17) == ERRNO | 1
    for bit in range(32):
        if NAMESPACES >> bit & 1:
            assert verdict(machine, clone, thread | 1 << bit) == ERRNO | 1
    for numbers, argument, values in LOOKED_AT.values():
        for value in range(1100):
            given = [0] * 6
            given[argument] = value
            assert (verdict(machine, numbers[column], *given) == ALLOW) == (value in values)
    for numbers in OWN_PID.values():
        for pid, expected in ((4321, ALLOW), (1, ERRNO | 1), (2**32 - 1, ERRNO | 1), (0, ERRNO | 1)):
            assert verdict(machine, numbers[column], pid) == expected


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_the_kernels_own(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.is_file():
        pytest.skip(f"{header} is not installed")
    known = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "#define" and words[2].isdigit():
            known.setdefault(words[1].removeprefix("__NR_").removeprefix("__NR3264_"), int(words[2]))
    known.setdefault("newfstatat", known.get("fstatat", -1))
    column = MACHINES[machine]
    table = {name: numbers[column] for name, numbers in NUMBERS.items()}
    table |= {name: numbers[column] for name, (numbers, _, _) in LOOKED_AT.items()}
    table |= {name: numbers[column] for name, numbers in OWN_PID.items()}
    for name, number in table.items():
        assert number is None or known[name] == number, name
