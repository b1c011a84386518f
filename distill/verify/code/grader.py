"""Programs to verdicts. The program runs in one sandbox, the tests in another; this process only carries lines between.

Two kinds of tests, as `Problem.metadata` holds them:

    {"tests", "setup", "prelude", "entry_point", "remote"}   test code that calls functions of the program
    {"cases": [{"input", "output"}, ...]}                    standard input, and the standard output it must give

The expected values are never in the program's sandbox: its side of the wire holds arguments going in and results coming
out, and what it writes can only be a result. So it passes by computing what is expected and in no other way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distill.recipe import CodeLimits
from distill.records import VerdictState
from distill.sandbox import Limits, Outcome, Sandbox, SandboxedProgram, SandboxFailure, compile_module, open_sandbox
from distill.verify.code import callee, examiner, wire

Result = tuple[VerdictState, str]
MAX_PROGRAM_CHARS = 200_000
PACKAGES = ("distill", "distill.verify", "distill.verify.code")


class CodeGrader:
    """Grades programs, `num_workers` at a time. Without a sandbox of the caller's, the first program has one found."""

    def __init__(self, limits: CodeLimits, *, num_workers: int, sandbox: Sandbox | None = None) -> None:
        self._limits = Limits(
            wall_s=limits.timeout_s,
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
        self._sandbox = sandbox

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
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _grade(self, sandbox: Sandbox, metadata: Mapping[str, Any], program: str) -> Result:
        if len(program) > MAX_PROGRAM_CHARS:
            return "wrong", f"{len(program)} characters are no program"
        for attempt in (1, 2):
            try:
                return grade_program(sandbox, metadata, program, self._limits, self._patience)
            except SandboxFailure as exc:
                if attempt == 2:
                    return "infra_error", str(exc)
        raise AssertionError("unreachable")


def grade_program(
    sandbox: Sandbox, metadata: Mapping[str, Any], program: str, limits: Limits, patience: Limits
) -> Result:
    """State and detail for one program. Raises SandboxFailure; for what the program does, never."""
    if metadata.get("cases"):
        return _grade_cases(sandbox, metadata["cases"], program, limits)
    if not metadata.get("tests"):
        return "unverifiable", "the problem has no tests"
    tests = {key: metadata.get(key) or default for key, default in TEST_FIELDS.items()}
    with_program = _start(sandbox, callee, limits)
    try:
        defined = with_program.exchange(_line({"define": [tests.pop("prelude"), program]}))
        if defined is None:
            return _ended(with_program)
        if fault := _raised(defined):
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
    said = tests.exchange(_line(request))
    while said is not None:
        message = json.loads(said)
        if "state" in message:
            return message["state"], message["detail"]
        reply = program.exchange(said)
        if reply is None:
            return _ended(program)
        asked = True
        said = tests.exchange(reply)
    if tests.timed_out:
        return ("timeout", "what the program gives takes too long to compare") if asked else NO_END
    return ("wrong", "the program's result cannot be taken in") if asked else NO_END


NO_END: Result = ("unverifiable", "the tests end without a verdict")


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
    """What counts of an output: its lines without trailing white space, and no empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _start(sandbox: Sandbox, module: Any, limits: Limits) -> SandboxedProgram:
    modules = dict.fromkeys(PACKAGES) | {wire.__name__: compile_module(wire.__file__)}
    started = sandbox.start(compile_module(module.__file__), limits, modules)
    if started.exchange(b"") != b"ready":  # nobody's program has run yet: a fault here is ours
        raise SandboxFailure(f"{module.__name__} does not start ({_ended(started)[1]})", where="sandbox")
    return started


def _ended(program: SandboxedProgram) -> Result:
    return _verdict_on_end(program.finish())


def _verdict_on_end(outcome: Outcome) -> Result:
    if outcome.how in ("wall_time", "cpu_time"):
        return "timeout", "out of time"
    if outcome.how == "output":
        return "wrong", "writes more than it may"
    last = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return "wrong", f"ends with status {outcome.exit_code}: {last[:200]}".removesuffix(": ")


def _raised(reply: bytes) -> str | None:
    """What the program raised while it was defined, or None."""
    try:
        message = json.loads(reply)
        return None if "raised" not in message else ": ".join(map(str, message["raised"]))[:300]
    except (ValueError, TypeError, RecursionError):
        return "talks nonsense"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()
