"""Records as Parquet: one column a field, mappings and nested values as JSON text. Written whole or not at all.

The bytes depend on the records and their order alone, so that a run that was killed and resumed leaves the same file
as one that was not.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from distill.errors import DataError
from distill.manifest import atomic_file

ROW_GROUP = 4_096
GROUP_CHARACTERS = 64 << 20  # of a row group: 4,096 answers of 32k tokens would be half a gigabyte
READ_ROWS = 512

M = TypeVar("M", bound=BaseModel)


def write_records(path: Path, records: Iterable[M], model: type[M]) -> int:
    """Write `records` to a Parquet file atomically and return how many there were. Holds one row group in memory."""
    with record_writer(path, model) as writer:
        for record in records:
            writer.write(record)
    return writer.count


@contextmanager
def record_writer(path: Path, model: type[M]) -> Iterator[RecordWriter[M]]:
    """Open a table to `write` records to one by one; the file appears at the end of the block, whole or not at all."""
    schema = schema_of(model)
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as parquet:
        writer = RecordWriter[M](parquet, schema, _json_fields(model))
        yield writer
        writer.flush()


class RecordWriter(Generic[M]):
    """Holds one row group in memory."""

    def __init__(self, parquet: Any, schema: Any, as_json: Sequence[str]) -> None:
        self._parquet, self._schema, self._as_json = parquet, schema, as_json
        self._rows: list[dict[str, Any]] = []
        self._characters = self.count = 0

    def write(self, record: M) -> None:
        row = _row(record, self._as_json)
        self._rows.append(row)
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        self.count += 1
        if len(self._rows) == ROW_GROUP or self._characters >= GROUP_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._characters = [], 0


def read_records(path: Path, model: type[M]) -> list[M]:
    """All records of a file that `write_records` wrote, or of a folder of such shards (`part-00000.parquet`, ...).

    Raises DataError naming the file, the row and the field.
    """
    return list(iterate_records(path, model))


def iterate_records(path: Path, model: type[M]) -> Iterator[M]:
    """Yield what `read_records` reads, one by one; holds one batch of rows in memory."""
    as_json = _json_fields(model)
    return (_record(row, model, as_json, path, number) for number, row in enumerate(_rows(path, model), start=1))


def _json_fields(model: type[BaseModel]) -> list[str]:
    return [name for name, info in model.model_fields.items() if _plain(info.annotation) is None]


def schema_of(model: type[BaseModel]) -> Any:
    return pa.schema([pa.field(name, *_arrow_type(info.annotation)) for name, info in model.model_fields.items()])


def shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _rows(path: Path, model: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of a folder's shards, one after the other."""
    if not path.is_dir():
        yield from _file_rows(path, model)
        return
    for number in range(max(1, len(list(path.glob("part-*.parquet"))))):
        yield from _file_rows(path / shard_name(number), model)


def _file_rows(path: Path, model: type[BaseModel]) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            for name, info in model.model_fields.items():
                if name not in present and info.is_required():
                    raise DataError("no such column", where=path, field=name)
            for batch in file.iter_batches(READ_ROWS, columns=[name for name in model.model_fields if name in present]):
                yield from batch.to_pylist()
    except FileNotFoundError as exc:
        raise DataError("no such file", where=path) from exc
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DataError(f"not a readable Parquet file ({exc})", where=path) from exc


def _record(row: dict[str, Any], model: type[M], as_json: Sequence[str], path: Path, number: int) -> M:
    try:
        for name in as_json:
            if row.get(name) is not None:
                row[name] = json.loads(row[name])
        return model.model_validate(row)
    except ValidationError as exc:
        fault = exc.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise DataError(fault["msg"], where=f"{path}: row {number}", field=field) from exc
    except (ValueError, TypeError) as exc:
        raise DataError(f"not JSON ({exc})", where=f"{path}: row {number}", field=name) from exc


def _row(record: BaseModel, as_json: Sequence[str]) -> dict[str, Any]:
    row = record.model_dump(mode="json")
    for name in as_json:
        row[name] = json.dumps(row[name], ensure_ascii=False, allow_nan=False)
    return row


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """The column's type and whether it may be null."""
    plain = _plain(annotation) or str
    nullable = type(None) in get_args(annotation)
    return (
        {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(plain, pa.string()),
        nullable,
    )


def _plain(annotation: Any) -> type | None:
    """str, int, float or bool for a field that is one of them (or of their literals, or optional), else None."""
    if annotation in (str, int, float, bool):
        return annotation  # type: ignore[no-any-return]
    members = [member for member in get_args(annotation) if member is not type(None)]
    if get_origin(annotation) is Literal:
        kinds = {type(member) for member in members}
        return kinds.pop() if len(kinds) == 1 else None
    if get_origin(annotation) in (Union, types.UnionType) and len(members) == 1:
        return _plain(members[0])
    return None
