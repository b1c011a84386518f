"""Questions from a file on this machine: JSON Lines (`.jsonl`, `.json`, `.jsonl.gz`) or Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.bundled import locate
from distill.errors import DataError
from distill.problems.rows import problem_of
from distill.problems.split import split_of
from distill.recipe import LocalSource
from distill.records import Problem


def file_path(source: LocalSource, base_dir: Path) -> Path:
    path = locate(source.path, base_dir)
    if not path.is_file():
        raise DataError("no such file", where=path, field="problems.path")
    return path


def read(source: LocalSource, base_dir: Path) -> Iterator[Problem]:
    """Yield the file's problems. Raises DataError naming the file, the line (counted from 1) and the field."""
    path = file_path(source, base_dir)
    name = path.name.removesuffix(".gz").rpartition(".")[0]
    num_rows = num_taken = 0
    for where, row in read_rows(path):
        num_rows += 1
        problem = problem_of(row, source, name=name, where=where)
        if source.split in ("all", split_of(problem.prompt)):
            yield problem
            num_taken += 1
            if num_taken == source.limit:
                return
    if num_rows == 0:
        raise DataError("holds no questions", where=path)
    if num_taken == 0:
        message = f"none of its {num_rows} questions is in the split {source.split!r} (held_out is one in eight)"
        raise DataError(message, where=path, field="problems.split")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's rows, each with where it stands: file and line. Raises DataError."""
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz")):
        raise DataError(f"must end in .jsonl, .json, .jsonl.gz or .parquet, got {path.suffix!r}", where=path)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as exc:  # also UnicodeDecodeError: a line torn inside a character
                raise DataError(f"not a JSON line ({exc})", where=where) from exc
            if not isinstance(row, dict):
                raise DataError(f"must be a JSON object, got {type(row).__name__}", where=where)
            yield where, row


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise DataError(f"not a whole gzip file ({exc})", where=path) from exc


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(1_024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DataError(f"not a readable Parquet file ({exc})", where=path) from exc
