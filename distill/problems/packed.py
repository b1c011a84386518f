"""Many questions in little memory: a million of them as objects would take gigabytes.

They are kept as compressed JSON, block by block, and made into `Problem`s when they are looked at; going through them
in order unpacks every block once. Of questions that occur twice (same id) the first stays.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from distill.records import Problem

BLOCK = 256
BLOCKS_OPEN = 8  # unpacked at a time: answers come back near the order in which they were asked for
ID_BYTES = 16
FIELDS = tuple(Problem.model_fields)


class PackedProblems:
    def __init__(self, problems: Iterable[Problem]) -> None:
        self._ids = bytearray()
        self._blocks: list[bytes] = []
        self._open: OrderedDict[int, list[Problem]] = OrderedDict()
        seen: set[bytes] = set()
        rows: list[list[object]] = []
        for problem in problems:
            identity = bytes.fromhex(problem.id)
            if identity in seen:
                continue
            seen.add(identity)
            self._ids += identity
            rows.append([getattr(problem, name) for name in FIELDS])
            if len(rows) == BLOCK:
                self._pack(rows)
                rows = []
        if rows:
            self._pack(rows)

    def __len__(self) -> int:
        return len(self._ids) // ID_BYTES

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, BLOCK)
        if number not in self._open:
            if len(self._open) == BLOCKS_OPEN:
                self._open.popitem(last=False)
            rows = json.loads(zlib.decompress(self._blocks[number]))
            self._open[number] = [Problem.model_construct(**dict(zip(FIELDS, row, strict=True))) for row in rows]
        self._open.move_to_end(number)
        return self._open[number][place]

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))

    def id(self, index: int) -> str:
        """The problem's id, without unpacking the problem."""
        return self._ids[index * ID_BYTES : (index + 1) * ID_BYTES].hex()

    def _pack(self, rows: list[list[object]]) -> None:
        self._blocks.append(zlib.compress(json.dumps(rows, ensure_ascii=False, allow_nan=False).encode(), 1))
