"""JSON of others: nesting is bounded, a key stands once, texts can be written down again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distill.reading.files import SETTINGS_BYTES, Fault, read_text

NESTING = 64
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, fault: Fault, *, max_bytes: int = SETTINGS_BYTES) -> Any:
    """The value in a file of settings. Raises `fault`."""
    text = read_text(path, fault, max_bytes=max_bytes)
    return parse_json(text, where=path, fault=fault, what="is not valid JSON")


def parse_json(
    text: str, *, where: Path | str, fault: Fault, nesting: int = NESTING, what: str = "not JSON", finite: bool = False
) -> Any:
    """The value of a JSON text; `finite` refuses NaN and Infinity. Raises `fault`, its message beginning with `what`.

    Refused are also brackets more than `nesting` deep, a key that an object has twice, and half a surrogate pair,
    which no file can hold. Numbers of thousands of digits are Python's to refuse.
    """
    try:
        constant = _not_finite if finite else None
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=constant)
        if text.count("[") + text.count("{") > nesting:
            _check_nesting(value, nesting)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as exc:
        raise fault(f"{what} (brackets are nested more than {nesting} deep)", where=where) from exc
    except UnicodeEncodeError as exc:
        raise fault(f"{what} (half of a surrogate pair, {exc.object[exc.start]!a})", where=where) from exc
    except ValueError as exc:
        raise fault(f"{what} ({exc})", where=where) from exc
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a mapping. Raises ValueError for a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} occurs twice")
            seen.add(name)
    return result


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _check_nesting(value: Any, nesting: int) -> None:
    """Level by level, without recursion."""
    brackets = [value] if isinstance(value, (dict, list)) else []
    for _ in range(nesting):
        within = (inner for outer in brackets for inner in (outer.values() if isinstance(outer, dict) else outer))
        brackets = [inner for inner in within if isinstance(inner, (dict, list))]
    if brackets:
        raise RecursionError
