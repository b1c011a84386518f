"""JSON as a server takes it: UTF-8, no key twice, finite numbers, 64-bit integers, whole characters, bounded in size.

Python's own reader takes NaN, keeps the last of two values of a key, and makes strings of half surrogate pairs, which
no encoder takes afterwards. Run as a program (by its path, with the standard library alone, so that it costs ten
megabytes) it reads for `teacher.admission.reader`: each document that comes on standard input as a frame is answered by
a frame.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import sys
from collections.abc import Iterator
from typing import IO, Any, NoReturn

MAX_DEPTH = 64
# Of a request with two thousand messages and a hundred tools; a list of integers, as of a prompt's tokens, is one.
MAX_VALUES = 2**15
Path = tuple[str | int, ...]
LENGTH = struct.Struct(">Q")
_SHOWN = 60
_LONG = re.compile("[0-9]{19}")
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


class DocumentError(ValueError):
    """What is wrong with a document, the path to it where that is known, and OpenAI's code where there is one."""

    def __init__(self, message: str, path: str | None = None, code: str | None = None) -> None:
        super().__init__(message, path, code)
        self.message = message
        self.path = path
        self.code = code


def loads(data: bytes, *, max_length: int | None = None) -> Any:
    """The value of a document. Raises DocumentError, also for a string of more than `max_length` characters, and for a
    list of more integers."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DocumentError(f"the body is not UTF-8, at byte {exc.start}") from None
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer if _LONG.search(text) else None,  # calling it for a million tokens takes a while
            parse_float=_number,
            parse_constant=_no_number,
        )
    except json.JSONDecodeError as exc:
        raise DocumentError(f"the body is not JSON: {exc}") from None
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    _check_size(tree)
    if max_length is not None and len(text) <= max_length:
        max_length = None
    may_have_halves = _HALF_ESCAPED.search(text) is not None
    for path, leaf in _leaves(tree) if may_have_halves or max_length is not None else ():
        if max_length is not None and len(leaf) > max_length:
            what = "characters" if isinstance(leaf, str) else "tokens"
            message = f"has {len(leaf)} {what}; at most {max_length} can fit into the model's context"
            raise DocumentError(message, _named(path), "context_length_exceeded")
        if may_have_halves and isinstance(leaf, str) and (half := _HALF.search(leaf)):
            raise DocumentError(f"has \\u{ord(half[0]):04x}, which is half a character", _named(path))
    return tree


_TOO_DEEP = f"the body is nested too deeply; allowed: {MAX_DEPTH} levels"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DocumentError(f"the body has the key {twice[:_SHOWN]!a} twice in one object")
    return tree


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise DocumentError(f"the body has an integer of {len(digits.lstrip('-'))} digits; allowed: 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise DocumentError(f"the body has the number {digits[:_SHOWN]}, which is too large")
    return value


def _no_number(name: str) -> NoReturn:
    raise DocumentError(f"the body is not JSON: {name} is no number")


def _check_size(tree: Any) -> None:
    """Level by level: the values that lie at one depth, then those within them."""
    num_values = 0
    level = [tree]
    for _ in range(MAX_DEPTH):
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise DocumentError(f"the body has too many values; allowed: {MAX_VALUES}, lists of integers aside")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list) and not _is_integers(value):
                below += value
        if not below:
            return
        level = below
    raise DocumentError(_TOO_DEEP)


def _leaves(tree: Any) -> Iterator[tuple[Path, str | list[int]]]:
    """Every string, keys among them, every list of integers, and the path to it."""
    waiting: list[tuple[Path, Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield (*path, key), key
                waiting.append(((*path, key), inner))
        elif isinstance(value, str) or _is_integers(value):
            yield path, value
        elif isinstance(value, list):
            waiting += [((*path, number), inner) for number, inner in enumerate(value)]


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _named(path: Path) -> str | None:
    """As OpenAI writes it: messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{ascii(part)[1:-1][:_SHOWN]}" for part in path)
    return "".join(parts).removeprefix(".") or None


# --- as a program -----------------------------------------------------------------------------------------------------


def _answer_all(source: IO[bytes], output: IO[bytes]) -> None:
    while head := source.read(LENGTH.size):
        (length,) = LENGTH.unpack(head)
        max_length, data = pickle.loads(source.read(length))
        try:
            answer = pickle.dumps((loads(data, max_length=max_length), None))
        except DocumentError as exc:
            answer = pickle.dumps((None, exc.args))
        output.write(LENGTH.pack(len(answer)) + answer)
        output.flush()


if __name__ == "__main__":
    _answer_all(sys.stdin.buffer, sys.stdout.buffer)
