"""The tests' side, in a sandbox of its own: runs a data set's test code, and asks the program for every result.

What a test calls is a `Remote`: the arguments go out as plain data, the result comes back as plain data, and the
comparison happens here, where the program has never been. Tests may loop, draw random numbers (from a fixed seed) and
allow tolerances; only what cannot be sent makes them unverifiable. Lines on the standard streams: `ask` with a request
for the program, whose reply comes in, and `end` with the verdict.
"""

from __future__ import annotations

import builtins
import os
import sys
from types import ModuleType, TracebackType
from typing import Any, BinaryIO

from distill.verify.code.wire import decode, encode

# A StopIteration would end a `map` of the tests before its time, as if all were well; a UnicodeError needs five values.
NEVER_RAISED = (StopIteration, StopAsyncIteration, UnicodeError)


class Unverifiable(BaseException):
    """These tests cannot be carried out from outside the program. No `except Exception` of theirs catches it."""


class Channel:
    def __init__(self) -> None:
        self._source: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._sink: BinaryIO = os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        self.num_replies = 0
        self._source.readline()
        self._sink.write(b"ready\n")
        self._sink.flush()

    def read(self) -> Any:
        line = self._source.readline()
        if not line:
            os._exit(1)
        return decode(line.rstrip(b"\n"), lambda where: Remote(self, where))

    def say(self, line: bytes) -> None:
        self._sink.write(line + b"\n")
        self._sink.flush()

    def ask(self, what: str, *values: Any) -> Any:
        """The program's own result, or its own exception."""
        try:
            request = encode((what, *values), reference)
        except RecursionError as exc:
            raise Unverifiable("an argument is too deep to be sent") from exc
        self.say(b"ask " + request)
        self.num_replies += 1  # from here on, what goes wrong is the program's doing, its reply no value at all
        outcome, *result = self.read()
        if outcome == "raised":
            name, message = map(str, result)
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NEVER_RAISED):
                raise kind(message)
            raise ProgramError(f"{name}: {message}")
        (value,) = result
        return value


class ProgramError(Exception):
    """The program raised something that is no built-in exception, or wanted to exit."""


class Remote:
    """A function or an object that lives in the program. It equals nothing, and the program is never asked whether."""

    def __init__(self, channel: Channel, where: str) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_where", where)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.ask("set", self, name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            raise Unverifiable("the tests compare two objects of the program's own")
        return False

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise AssertionError(f"the result is {self!r}, no plain data")

    def __repr__(self) -> str:
        return str(self._where.rpartition(":")[2])


def reference(value: Any) -> str:
    if isinstance(value, Remote):
        return str(value._where)
    raise Unverifiable(f"an argument of type {type(value).__name__} cannot be sent to the program")


def examine(channel: Channel, request: dict[str, Any]) -> tuple[str, str]:
    """State and detail."""
    tests = request["tests"]
    if "random" in tests or "random" in request["setup"]:
        import random  # not for every program: it is a third of an interpreter's start

        random.seed(0)
    module = ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    names.update({name: Remote(channel, name) for name in request["remote"]})
    try:
        exec(compile(request["setup"], "setup", "exec"), names)
        exec(compile(tests, "tests", "exec"), names)
        if request["entry_point"]:
            names["check"](Remote(channel, request["entry_point"]))
    except Unverifiable as exc:
        return "unverifiable", str(exc)
    except (NameError, ImportError, SyntaxError) as exc:  # the program's own come back as what it says of them
        if channel.num_replies == 0 or places(exc.__traceback__)[-1][0] in ("tests", "setup"):
            return "unverifiable", f"the tests do not run ({type(exc).__name__}: {exc})"
        return "wrong", failure(exc, tests)
    except Exception as exc:  # noqa: BLE001  tests raise anything at all over a result that they did not expect
        if channel.num_replies == 0:
            return "unverifiable", f"the tests do not run ({type(exc).__name__}: {exc})"
        return "wrong", failure(exc, tests)
    if channel.num_replies == 0:
        return "unverifiable", "the tests ask nothing of the program"
    return "correct", ""


def places(trace: TracebackType | None) -> list[tuple[str, int]]:
    """File and line of every frame, the innermost last. The traceback module takes longer to import than most tests."""
    found = []
    while trace is not None:
        found.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return found


def failure(exc: Exception, tests: str) -> str:
    number = next((number for name, number in reversed(places(exc.__traceback__)) if name == "tests"), None)
    line = "" if number is None else tests.splitlines()[number - 1].strip()
    what = "fails" if isinstance(exc, AssertionError) else f"{type(exc).__name__}: {exc}"[:200]
    return f"{what}: {line}"


def main() -> None:
    channel = Channel()
    state, detail = examine(channel, channel.read())
    channel.say(b"end " + encode((state, detail[:500]), repr))
    os._exit(0)


if __name__ == "__main__":
    main()
