"""The program's side, inside its sandbox: defines the program, then computes what it is asked for and says the result.

Nothing here is trusted. It never sees a test or an expected value, so a reply can be nothing but a claim, which the
tests weigh in a process of their own. Lines of JSON on the standard streams that the process was born with; the program
itself gets empty input, and its output is thrown away.
"""

from __future__ import annotations

import json
import os
import sys
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
            reply = {"value": encode(perform(json.loads(line), program, held), lambda value: hold(value, held))}
            text = json.dumps(reply)
        except BaseException as exc:  # noqa: BLE001  the program may raise anything, SystemExit among it
            text = json.dumps({"raised": [type(exc).__name__, f"{exc}"[:200]]})
        sink.write(text.encode() + b"\n")
        sink.flush()


def perform(request: dict[str, Any], program: ModuleType, held: list[Any]) -> Any:
    if "define" in request:
        for source in request["define"]:
            exec(compile(source, "program", "exec"), program.__dict__)
        return None
    name, *rest = request["do"]
    target, *arguments = (decode(form, lambda where: find(where, program, held)) for form in rest)
    if name == "call":
        return target(*arguments[0], **arguments[1])
    if name == "get":
        return getattr(target, arguments[0])
    return setattr(target, *arguments)


def hold(value: Any, held: list[Any]) -> list[Any]:
    held.append(value)
    return [len(held) - 1, type(value).__name__]


def find(where: Any, program: ModuleType, held: list[Any]) -> Any:
    return getattr(program, where) if isinstance(where, str) else held[where[0]]


if __name__ == "__main__":
    main()
