"""What the tables of the documents are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Read = Callable[[str], Mapping[str, Any]]  # the result of a name, for one device; raises NotMeasuredError
Row = Mapping[str, Any]

BENCHMARK_SETS = {"gsm8k": "GSM8K", "math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025"}


class NotMeasuredError(LookupError):
    """There is no such result of this device."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
