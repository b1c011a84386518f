"""Values as JSON, between a program in its sandbox and the tests in theirs: plain data with its exact types.

What arrives is made of the built-in types themselves, whatever the sender's classes say of equality, hash or truth:
that is the whole point. A value that is not plain data stays where it is and travels as a reference. The module is sent
into sandboxes and imports the standard library alone.

    None, booleans, strings, floats, small integers, lists    themselves
    everything else                                           {tag: content}, one key
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_ITEMS = 1_000_000  # of an iterator, which may have no end
SMALL = 1 << 62


def encode(value: Any, hold: Callable[[Any], Any]) -> Any:
    """JSON for `value`; `hold` gives the reference for what is not plain data, or raises."""
    if value is None or value is True or value is False:
        return value
    kind: type = type(value)
    # Methods of the base class, not of the value: a subclass is taken for what it is underneath.
    if issubclass(kind, int):
        number = int.__pos__(value)
        return number if -SMALL < number < SMALL else {"int": hex(number)}
    if issubclass(kind, float):
        return float.__pos__(value)
    if issubclass(kind, str):
        return str.__str__(value)
    for base, tag in CONTAINERS:
        if issubclass(kind, base):
            items = [encode(item, hold) for item in base.__iter__(value)]
            return items if tag is None else {tag: items}
    if issubclass(kind, dict):
        return {"dict": [[encode(key, hold), encode(item, hold)] for key, item in dict.items(value)]}
    if issubclass(kind, (bytes, bytearray)):
        return {"bytearray" if issubclass(kind, bytearray) else "bytes": bytes(value).hex()}
    if issubclass(kind, complex):
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [encode(number, hold) for number in (value.start, value.stop, value.step)]}
    if kind.__module__ in ("decimal", "_decimal", "fractions") and kind.__name__ in ("Decimal", "Fraction"):
        return {kind.__name__: str(value)}
    if hasattr(kind, "__next__"):
        return {"iterator": [encode(item, hold) for item, _ in zip(value, range(MAX_ITEMS), strict=False)]}
    if kind is type and vars(builtins).get(name := str(getattr(value, "__name__", ""))) is value:
        return {"type": name}
    if kind in VIEWS:
        return {VIEWS[kind]: [encode(item, hold) for item in value]}
    return {"held": hold(value)}


def decode(form: Any, held: Callable[[Any], Any]) -> Any:
    """The value again; `held` gives what a reference stands for. Raises ValueError for what `encode` never wrote."""
    if isinstance(form, list):
        return [decode(item, held) for item in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError("not a value")
    ((tag, content),) = form.items()
    if tag in MAKERS:
        if not isinstance(content, list):
            raise ValueError("not a value")
        return MAKERS[tag](decode(item, held) for item in content)
    if tag == "dict":
        return {decode(key, held): decode(item, held) for key, item in content}
    if tag == "int":
        return int(content, 16)
    if tag in ("bytes", "bytearray"):
        return bytes.fromhex(content) if tag == "bytes" else bytearray.fromhex(content)
    if tag == "complex":
        return complex(*map(float, content))
    if tag == "range":
        return range(*(decode(number, held) for number in content))
    if tag == "Decimal":
        from decimal import Decimal

        return Decimal(content)
    if tag == "Fraction":
        from fractions import Fraction

        return Fraction(content)
    if tag == "type" and isinstance(found := getattr(builtins, content, None), type):
        return found
    if tag == "held":
        return held(content)
    raise ValueError("not a value")


CONTAINERS: tuple[tuple[Any, str | None], ...] = (
    (list, None),
    (tuple, "tuple"),
    (set, "set"),
    (frozenset, "frozenset"),
    (deque, "deque"),
)
MAKERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "iterator": lambda items: iter(list(items)),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
}
VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.items()): "keys", type({}.values()): "values"}
