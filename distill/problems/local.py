"""Questions from a file on this machine: JSON Lines (`.jsonl`, `.json`, `.jsonl.gz`) or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.bundled import locate
from distill.errors import DataError
from distill.problems.rows import fields_of, problem_of
from distill.problems.split import split_of
from distill.reading.lines import json_rows
from distill.reading.parquet import parquet_rows
from distill.recipe import LocalSource, ReadLimits
from distill.records import Problem


def file_path(source: LocalSource, base_dir: Path) -> Path:
    path = locate(source.path, base_dir)
    if not path.is_file():
        raise DataError("no such file", where=path, field="problems.path")
    return path


def read(source: LocalSource, base_dir: Path, limits: ReadLimits) -> Iterator[Problem]:
    """Yield the file's problems. Raises DataError naming the file, the line (counted from 1) and the field."""
    path = file_path(source, base_dir)
    name = path.name.removesuffix(".gz").rpartition(".")[0]
    num_rows = num_taken = 0
    for where, row in read_rows(path, limits, fields_of(source)):
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


def read_rows(
    path: Path, limits: ReadLimits, fields: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's rows, each with where it stands: file and line. A table's are read with these fields alone.

    Raises DataError, also for what is over `limits`.
    """
    if path.suffix == ".parquet":
        return parquet_rows(path, limits, fields)
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz")):
        raise DataError(f"must end in .jsonl, .json, .jsonl.gz or .parquet, got {path.suffix!r}", where=path)
    return json_rows(path, limits)
