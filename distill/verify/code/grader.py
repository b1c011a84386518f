"""Programs to verdicts. The program runs in one sandbox, the tests in another; this process only carries lines between.

Two kinds of tests, as `Problem.metadata` holds them:

    {"tests", "setup", "prelude", "entry_point", "remote"}   test code that calls functions of the program
    {"cases": [{"input", "output"}, ...], "prelude"}         standard input, and the standard output it must give

The expected values are never in the program's sandbox: its side of the wire holds arguments going in and results coming
out, and what it writes can only be a result. So it passes by computing what is expected and in no other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from distill.recipe import CodeLimits
from distill.records import VerdictState
from distill.sandbox import Limits, Outcome, Sandbox, SandboxedProgram, SandboxFailure, compile_module, open_sandbox
from distill.verify.code import callee, examiner, wire

Result = tuple[VerdictState, str]
MAX_PROGRAM_CHARS = 200_000
WAITING = 1.5  # by the clock, for every second of processor time: other programs run as well
PACKAGES = tuple(accumulate(__package__.split("."), "{}.{}".format))  # from the outermost to this one


class ProgramKilled(Exception):
    """SIGKILL ended a program, and not from here: it may have done it to itself, or the machine is out of memory."""


class CodeGrader:
    """Grades programs, `num_workers` at a time. Without a sandbox of the caller's, the first program has one found."""

    def __init__(self, limits: CodeLimits, *, num_workers: int, sandbox: Sandbox | None = None) -> None:
        self._limits = Limits(
            wall_s=WAITING * limits.timeout_s,
            cpu_s=limits.timeout_s,
            memory_bytes=limits.memory_mib << 20,
            output_bytes=limits.output_mib << 20,
            num_threads=limits.num_threads,
        )
        # The tests wait for the program: their time is the program's and as much again.
        self._patience = Limits(
            wall_s=2 * limits.timeout_s,
            cpu_s=2 * limits.timeout_s,
            memory_bytes=2 * self._limits.memory_bytes,
            output_bytes=4 * self._limits.output_bytes,
            num_threads=limits.num_threads,
        )
        self._num_workers = num_workers
        self._threads: ThreadPoolExecutor | None = None
        self._sandbox, self._owns_sandbox = sandbox, sandbox is None

    def submit(self, metadata: Mapping[str, Any], program: str) -> Future[Result]:
        """Start grading one program. Raises EnvironmentFault where this machine has no sandbox."""
        if self._sandbox is None:
            self._sandbox = open_sandbox()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="code-grader")
        return self._threads.submit(self._grade, self._sandbox, metadata, program)

    def run(self, tasks: Sequence[tuple[Mapping[str, Any], str]]) -> Iterator[Result]:
        """Yield one result a program, in order."""
        futures = [self.submit(metadata, program) for metadata, program in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End what is being graded, at once if the sandbox is our own."""
        if self._sandbox is not None and self._owns_sandbox:
            self._sandbox.close()
            self._sandbox = None
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _grade(self, sandbox: Sandbox, metadata: Mapping[str, Any], program: str) -> Result:
        if len(program) > MAX_PROGRAM_CHARS:
            return "wrong", f"{len(program)} characters are no program"
        try:
            return grade_program(sandbox, metadata, program, self._limits, self._patience)
        except (SandboxFailure, ProgramKilled):
            pass  # once more: what happens to us once, a program that does it to itself does every time
        try:
            return grade_program(sandbox, metadata, program, self._limits, self._patience)
        except SandboxFailure as exc:
            return "infra_error", str(exc)
        except ProgramKilled:
            return "wrong", "killed"


def grade_program(
    sandbox: Sandbox, metadata: Mapping[str, Any], program: str, limits: Limits, patience: Limits
) -> Result:
    """State and detail for one program. Raises SandboxFailure where it is our fault, Killed where it may be."""
    if metadata.get("cases"):
        behind = "" if "__future__" in program else metadata.get("prelude", "")  # which only stands first
        return _grade_cases(sandbox, metadata["cases"], f"{behind}\n{program}" if behind else program, limits)
    if not metadata.get("tests"):
        return "unverifiable", "the problem has no tests"
    tests = {key: metadata.get(key) or default for key, default in TEST_FIELDS.items()}
    with_program = _start(sandbox, callee, limits)
    try:
        defined = with_program.exchange(wire.encode(("define", tests.pop("prelude"), program), repr))
        if defined is None:
            return _result_of_end(with_program)
        if fault := _exception_in(defined):
            return "wrong", fault
        with_tests = _start(sandbox, examiner, patience)
        try:
            return _examine(with_program, with_tests, tests)
        finally:
            with_tests.kill()
    finally:
        with_program.kill()


TEST_FIELDS: dict[str, Any] = {"tests": "", "setup": "", "prelude": "", "entry_point": None, "remote": []}


def _examine(program: SandboxedProgram, tests: SandboxedProgram, request: dict[str, Any]) -> Result:
    asked = False
    said = tests.exchange(wire.encode(request, repr))
    while said is not None:
        what, _, content = said.partition(b" ")
        if what == b"end":
            state, detail = wire.decode(content, str)
            return state, detail
        reply = program.exchange(content)
        if reply is None:
            return _result_of_end(program)
        asked = True
        said = tests.exchange(reply)
    outcome = tests.finish()
    if outcome.killed:
        raise SandboxFailure("the tests were killed from outside", where="sandbox")
    if not asked:
        return "unverifiable", "the tests end without a verdict"
    if outcome.how in ("wall_time", "cpu_time"):
        return "timeout", "what the program gives takes too long to compare"
    return "wrong", "the program's result cannot be taken in"


def _grade_cases(sandbox: Sandbox, cases: Sequence[Mapping[str, Any]], program: str, limits: Limits) -> Result:
    for number, case in enumerate(cases, start=1):
        outcome = sandbox.run(program, str(case["input"]).encode(errors="replace"), limits)
        if outcome.how != "exit" or outcome.exit_code != 0:
            state, detail = _verdict_on_end(outcome)
            return state, f"test {number} of {len(cases)}: {detail}"
        if _lines(outcome.stdout.decode(errors="replace")) != _lines(str(case["output"])):
            return "wrong", f"test {number} of {len(cases)}: other output than expected"
    return "correct", ""


def _lines(text: str) -> list[str]:
    """The part of an output that counts: its lines without trailing white space, and no empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _start(sandbox: Sandbox, module: Any, limits: Limits) -> SandboxedProgram:
    modules = dict.fromkeys(PACKAGES) | {wire.__name__: compile_module(wire.__file__)}
    started = sandbox.start(compile_module(module.__file__), limits, modules)
    if started.exchange(b"") != b"ready":  # nobody's program has run yet: a fault here is ours
        raise SandboxFailure(f"{module.__name__} does not start ({_result_of_end(started)[1]})", where="sandbox")
    return started


def _result_of_end(program: SandboxedProgram) -> Result:
    return _verdict_on_end(program.finish())


def _verdict_on_end(outcome: Outcome) -> Result:
    if outcome.killed:
        raise ProgramKilled
    if outcome.how in ("wall_time", "cpu_time"):
        return "timeout", "out of time"
    if outcome.how == "output":
        return "wrong", "writes more than it may"
    last = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return "wrong", f"ends with status {outcome.exit_code}: {last[:200]}".removesuffix(": ")


def _exception_in(reply: bytes) -> str | None:
    """The exception that the program raised while it was defined, or None."""
    try:
        outcome, *said = wire.decode(reply, str)
    except (ValueError, TypeError, RecursionError):
        return "talks nonsense"
    return ": ".join(map(str, said))[:300] if outcome == "raised" else None
