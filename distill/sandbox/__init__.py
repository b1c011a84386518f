"""Untrusted Python programs, run so that they can do nothing but compute.

`open_sandbox` finds the strongest sandbox that this machine can make and proves it with a hostile program.
`Sandbox.run` gives a program its input and returns how it ended and what it wrote; `Sandbox.start` is for speaking with
one. A program sees the standard library and its standard streams. It has one process, no network, no file to write,
limits on time, memory, threads and output, and an interpreter of its own that ends with it.
"""

from __future__ import annotations

import json
import marshal
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from distill.sandbox import launcher, probe
from distill.sandbox.levels import (
    ENVIRONMENT,
    LEVELS,
    Cage,
    Level,
    Unavailable,
    build_cage,
    new_user,
    refusal,
)
from distill.sandbox.program import Limits, Outcome, SandboxedProgram, SandboxFailure

__all__ = ["LEVELS", "Level", "Limits", "Outcome", "Sandbox", "SandboxFailure", "SandboxedProgram", "open_sandbox"]

PROBE_LIMITS = Limits(wall_s=60.0, cpu_s=30.0, memory_bytes=1 << 30, output_bytes=1 << 16, num_threads=8, num_files=32)


class Sandbox:
    """One level of the ladder, known to hold. Keeps nothing between programs; may be used by several threads."""

    def __init__(self, cage: Cage, passed_over: Mapping[Level, str]) -> None:
        self._cage = cage
        self.passed_over = dict(passed_over)  # stronger levels, and why they are not this one
        self._stop = threading.Event()

    @property
    def level(self) -> Level:
        return self._cage.level

    def run(self, source: str, stdin: bytes, limits: Limits) -> Outcome:
        """Run a program to its end or its limits. Raises SandboxFailure, never for what the program does."""
        return self.start(source, limits).finish(stdin)

    def start(
        self, source: str | CodeType, limits: Limits, modules: Mapping[str, CodeType | None] | None = None
    ) -> SandboxedProgram:
        """A program that waits for input. `modules` are put where its imports find them; None is an empty package."""
        setup = self._cage.setup | {
            "limits": {
                "AS": limits.memory_bytes,
                "CPU": math.ceil(limits.cpu_s) + 1,
                "NPROC": limits.num_threads,
                "NOFILE": limits.num_files,
                "FSIZE": 0,
                "CORE": 0,
                "MEMLOCK": 0,
                "MSGQUEUE": 0,
            },
            "source": source,
            "modules": dict(modules or {}),
        }
        return SandboxedProgram(self._cage.command, ENVIRONMENT, self._opening(setup), limits, self._stop)

    def close(self) -> None:
        """End what runs, in whatever thread, with a SandboxFailure there; nothing can be started any more."""
        self._stop.set()

    def _opening(self, setup: dict[str, Any]) -> Callable[[int], bytes]:
        def opening(pid: int) -> bytes:
            own = {
                "uid": new_user(pid) if setup["new_user"] else None,
                "parent": os.getpid() if self._cage.parent_visible else 0,
            }
            parts = (_compile(launcher.__file__), marshal.dumps(setup | own))
            return b"".join(len(part).to_bytes(8, "little") + part for part in parts)

        return opening


def open_sandbox(level: Level | None = None) -> Sandbox:
    """The strongest sandbox that holds here, or the one asked for. Raises EnvironmentFault where there is none."""
    reasons: dict[Level, str] = {}
    for candidate in LEVELS if level is None else (level,):
        try:
            sandbox = Sandbox(build_cage(candidate), reasons)
            _prove(sandbox)
            return sandbox
        except (Unavailable, SandboxFailure) as exc:
            reasons[candidate] = str(exc)
    raise refusal(reasons)


@cache
def compile_module(path: str) -> CodeType:
    """A module of ours as code to send into a sandbox."""
    return compile(Path(path).read_text(encoding="utf-8"), Path(path).name, "exec", dont_inherit=True)


@cache
def _compile(path: str) -> bytes:
    return marshal.dumps(compile_module(path))


def _prove(sandbox: Sandbox) -> None:
    """Raise Unavailable where the probe could do what it must not, or could not do what it must."""
    with tempfile.NamedTemporaryFile(prefix="potstill-probe-") as planted:  # outside, and for anyone to read
        os.fchmod(planted.fileno(), 0o644)
        call = f"import json, probe; print(json.dumps(probe.report({planted.name!r}, {PROBE_LIMITS.num_threads})))"
        outcome = sandbox.start(call, PROBE_LIMITS, {"probe": compile_module(probe.__file__)}).finish()
        for folder in (Path(planted.name).parent, Path("/")):
            (folder / (Path(planted.name).name + probe.ESCAPED)).unlink(missing_ok=True)
    try:
        found = json.loads(outcome.stdout)
    except ValueError as exc:
        said = outcome.stderr.decode(errors="replace").strip()[-200:]
        raise Unavailable(f"the probe does not run ({outcome.how}, exit {outcome.exit_code}: {said})") from exc
    if found["worked"]:
        raise Unavailable(f"does not hold: a program could {', '.join(found['worked'])}")
    if not 0 < found["threads"] <= PROBE_LIMITS.num_threads:
        raise Unavailable(f"does not hold: a program could start {found['threads']} threads")
    if leaked := set(found["environment"]) - {*ENVIRONMENT, "PWD"}:
        raise Unavailable(f"does not hold: a program sees {', '.join(sorted(leaked))}")
