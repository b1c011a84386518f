"""Values as one line of text, between a program in its sandbox and the tests in theirs: plain data, exact types.

What arrives is made of the built-in types themselves, whatever the sender's classes say of equality, hash or truth:
that is the whole point. A value that is not plain data stays where it is and travels as a reference. The module is sent
into sandboxes and imports next to nothing: `json` alone takes an interpreter as long as its own start.

Tokens are separated by spaces and begin with a letter for their kind; a container's says how many tokens of its own
follow it: `[1, "a b"]` is `l2 i1 sa\\x20b`.
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 1_000_000  # of an iterator, which may have no end


def encode(value: Any, hold: Callable[[Any], str]) -> bytes:
    """One line, without its end. `hold` names what is not plain data, or raises."""
    tokens: list[str] = []
    _write(value, tokens.append, hold)
    return " ".join(tokens).encode("ascii")


def decode(line: bytes, held: Callable[[str], Any]) -> Any:
    """The value again; `held` gives what a name stands for. Raises ValueError for what `encode` never wrote."""
    tokens = iter(line.decode("ascii").split(" "))
    try:
        value = _read(tokens, held)
    except (TypeError, KeyError, ArithmeticError) as exc:  # what cannot be hashed, no such type, a fraction over zero
        raise ValueError("not a value") from exc
    if next(tokens, None) is not None:
        raise ValueError("more than a value")
    return value


def _write(value: Any, add: Callable[[str], None], hold: Callable[[Any], str]) -> None:
    kind: Any = type(value)
    if value is None or value is True or value is False:
        add(str(value)[0])
    # Methods of the base class, not of the value: a subclass is taken for what it is underneath.
    elif issubclass(kind, int):
        add(f"i{int.__pos__(value):x}")
    elif issubclass(kind, float):
        add("f" + float.hex(value))
    elif issubclass(kind, str):
        add("s" + _escape(str.__str__(value)))
    elif tag := next((tag for tag, (base, _) in CONTAINERS.items() if issubclass(kind, base)), None):
        _write_items(tag, list(CONTAINERS[tag][0].__iter__(value)), add, hold)
    elif issubclass(kind, dict):
        _write_items("d", [part for item in dict.items(value) for part in item], add, hold)
    elif issubclass(kind, (bytes, bytearray)):
        add(("B" if issubclass(kind, bytearray) else "b") + bytes(value).hex())
    elif issubclass(kind, complex):
        add(f"c{float.hex(value.real)},{float.hex(value.imag)}")
    elif kind is range:
        add(f"r{value.start:x},{value.stop:x},{value.step:x}")
    elif kind.__module__ in ("decimal", "_decimal", "fractions") and kind.__name__ in ("Decimal", "Fraction"):
        add(kind.__name__[0] + str(value))
    elif hasattr(kind, "__next__"):
        _write_items("n", [item for item, _ in zip(value, range(MAX_ITEMS), strict=False)], add, hold)
    elif kind is type and value in TYPES.values():
        add("y" + next(name for name, known in TYPES.items() if known is value))
    elif kind in VIEWS:
        _write_items(VIEWS[kind], list(value), add, hold)
    else:
        add("h" + _escape(hold(value)))


def _write_items(tag: str, items: list[Any], add: Callable[[str], None], hold: Callable[[Any], str]) -> None:
    add(f"{tag}{len(items)}")
    for item in items:
        _write(item, add, hold)


def _read(tokens: Iterator[str], held: Callable[[str], Any]) -> Any:
    token = next(tokens, "")
    tag, content = token[:1], token[1:]
    if tag in MAKERS:
        return MAKERS[tag]([_read(tokens, held) for _ in range(int(content))])
    if tag == "s":
        return _plain(content)
    if tag == "h":
        return held(_plain(content))
    if tag in READERS:
        return READERS[tag](content)
    raise ValueError("not a value")


def _escape(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii").replace(" ", "\\x20")


def _plain(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape")


def _dict(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


def _fraction(text: str) -> Any:
    from fractions import Fraction

    return Fraction(text)


TYPES: dict[str, type] = {name: value for name, value in vars(builtins).items() if type(value) is type}
CONTAINERS: dict[str, tuple[Any, Callable[[list[Any]], Any]]] = {
    "l": (list, list),
    "t": (tuple, tuple),
    "e": (set, set),
    "z": (frozenset, frozenset),
    "q": (deque, deque),
}
VIEWS: dict[type, str] = {type({}.keys()): "k", type({}.items()): "k", type({}.values()): "v"}
MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    **{tag: make for tag, (_, make) in CONTAINERS.items()},
    "d": _dict,
    "n": iter,
    "k": lambda items: dict.fromkeys(items).keys(),
    "v": lambda items: dict(enumerate(items)).values(),
}
READERS: dict[str, Callable[[str], Any]] = {
    "N": lambda text: None,
    "T": lambda text: True,
    "F": lambda text: False if not text else _fraction(text),
    "i": lambda text: int(text, 16),
    "f": float.fromhex,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "c": lambda text: complex(*map(float.fromhex, text.split(","))),
    "r": lambda text: range(*(int(part, 16) for part in text.split(","))),
    "D": _decimal,
    "y": lambda text: TYPES[text],
}
