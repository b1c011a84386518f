"""Questions from a file on this machine: JSON Lines (`.jsonl`, `.json`, `.jsonl.gz`) or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.problems.rows import fields_of, problem_of
from distill.reading.lines import json_rows
from distill.reading.parquet import parquet_rows
from distill.recipe import LocalSource, ReadLimits
from distill.records import Problem


def file_path(source: LocalSource, base_dir: Path) -> Path:
    path = base_dir / source.path
    if not path.is_file():
        raise DataError("no such file", where=path, field="problems.path")
    return path


def read(source: LocalSource, base_dir: Path, limits: ReadLimits) -> Iterator[Problem]:
    """Yield the file's problems. Raises DataError naming the file, the line (counted from 1) and the field."""
    path = file_path(source, base_dir)
    number = 0
    for number, (where, row) in enumerate(_rows(path, source, limits), start=1):
        yield problem_of(row, source, name=path.name.removesuffix(".gz").rpartition(".")[0], where=where)
        if number == source.limit:
            return
    if number == 0:
        raise DataError("holds no questions", where=path)


def _rows(path: Path, source: LocalSource, limits: ReadLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet":
        return parquet_rows(path, limits, fields_of(source))
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz")):
        raise DataError(f"must end in .jsonl, .json, .jsonl.gz or .parquet, got {path.suffix!r}", where=path)
    return json_rows(path, limits)
