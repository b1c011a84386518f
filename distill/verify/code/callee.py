"""The program's side, inside its sandbox: defines the program, then computes what it is asked for and says the result.

Nothing here is trusted. It never sees a test or an expected value, so a reply can be nothing but a claim, which the
tests weigh in a process of their own. One line a request, one a reply (`wire`), on the standard streams that the
process was born with; the program itself gets empty input, and its output is thrown away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from distill.verify.code.wire import decode, encode


def main() -> None:
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    held: list[Any] = []
    program = ModuleType("program")
    sys.modules["program"] = program
    source.readline()
    sink.write(b"ready\n")
    sink.flush()
    for line in source:
        try:
            what, *request = decode(line.rstrip(b"\n"), lambda where: find(where, program, held))
            reply = encode(("value", PERFORM[what](program, *request)), lambda value: hold(value, held))
        except BaseException as exc:  # noqa: BLE001  the program may raise anything, SystemExit among it
            reply = encode(("raised", type(exc).__name__, f"{exc}"[:200]), repr)
        sink.write(reply + b"\n")
        sink.flush()


def define(program: ModuleType, *sources: str) -> None:
    for source in sources:
        exec(compile(source, "program", "exec"), program.__dict__)


PERFORM: dict[str, Callable[..., Any]] = {
    "define": define,
    "call": lambda program, target, args, kwargs: target(*args, **kwargs),
    "get": lambda program, target, name: getattr(target, name),
    "set": lambda program, target, name, value: setattr(target, name, value),
}


def hold(value: Any, held: list[Any]) -> str:
    held.append(value)
    return f"{len(held) - 1}:{type(value).__name__}"


def find(where: str, program: ModuleType, held: list[Any]) -> Any:
    """Look up what a reference stands for: a name of the program's, or something that it gave out before."""
    index, held_before, _ = where.partition(":")
    return held[int(index)] if held_before else getattr(program, where)


if __name__ == "__main__":
    main()
