"""JSON Lines, compressed or not, one bounded line at a time."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.errors import DataError
from distill.reading.files import open_file
from distill.reading.json_text import parse_json
from distill.recipe.limits import ReadLimits

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Nobody leaves so many; a compressed file has room for a billion of them.
MAX_BLANK_LINES = 100_000


def json_rows(path: Path, limits: ReadLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of JSON Lines with their place (`file:line`, from 1); blank lines are passed over.

    Raises DataError for a file that cannot be read or is not whole, naming the line where it is one.
    """
    for number, line in _lines(path, limits):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as exc:
            raise DataError(f"not a JSON line (not UTF-8: {exc.reason} at byte {exc.start})", where=where) from exc
        row = parse_json(
            text, where=where, fault=DataError, nesting=limits.nesting, what="not a JSON line", finite=True
        )
        if not isinstance(row, dict):
            raise DataError(f"must be a JSON object, got {type(row).__name__}", where=where)
        yield where, row


def _lines(path: Path, limits: ReadLimits) -> Iterator[tuple[int, bytes]]:
    number = num_bytes = num_blank = 0
    with open_file(path, DataError) as file:
        unpacked = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
        while line := _next_line(unpacked, path, limits.line_bytes + 1):
            number += 1
            num_bytes += len(line)
            where = f"{path}:{number}"
            if len(line) > limits.line_bytes:
                raise DataError(f"is over {limits.line_mib} MiB long (limits.line_mib)", where=where)
            if num_bytes > limits.file_bytes:
                raise DataError(f"the file goes on beyond {limits.file_gib} GiB (limits.file_gib)", where=where)
            if number > limits.rows:
                raise DataError(f"the file goes on beyond {limits.rows} lines (limits.rows)", where=where)
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                num_blank = 0
                yield number, line
                continue
            num_blank += 1
            if num_blank > MAX_BLANK_LINES:
                raise DataError(f"the last {num_blank} lines are blank", where=where)


def _next_line(file: BinaryIO, path: Path, most: int) -> bytes:
    try:
        return file.readline(most)
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise DataError(f"not a whole gzip file ({exc})", where=path) from exc
    except OSError as exc:
        raise DataError(f"cannot be read ({exc.strerror or exc})", where=path) from exc
