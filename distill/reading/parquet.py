"""Parquet files of others: what the footer says is judged before a page is unpacked, then every row's texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.reading.files import open_file
from distill.recipe.limits import ReadLimits

BATCH_ROWS = 1_024
# Unpacked at a time; a row group of writers that we know has 64 MiB to 1 GiB of all its columns.
BATCH_BYTES = 64 << 20
COLUMN_CHUNK_BYTES = 1 << 30


@contextmanager
def parquet_faults(path: Path) -> Iterator[None]:
    """Whatever pyarrow finds wrong in a file, as DataError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DataError(f"not a readable Parquet file ({exc})", where=path) from exc


def parquet_rows(
    path: Path, limits: ReadLimits, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows with their place (`file: row n`, from 1) and all columns, or those of `columns` that are there.

    Raises DataError.

    A dictionary's texts stay in it until a row is made: written out, a file of a kilobyte can stand for terabytes.
    """
    import pyarrow.parquet as pq

    number = 0
    with open_file(path, DataError) as opened, parquet_faults(path):
        footer = pq.read_metadata(opened)
        present, num_rows, packed = _judged(footer, path, limits, columns)
        file = pq.ParquetFile(opened, metadata=footer, read_dictionary=packed)
        # Group by group: no batch may lie in two, whose dictionaries are not the same.
        batches = (
            file.iter_batches(num_rows, row_groups=[group], columns=present) for group in range(file.num_row_groups)
        )
        for batch in chain.from_iterable(batches):
            for rows in _pieces(batch, limits.line_bytes):
                if rows.num_rows == 1 and _num_bytes(rows) > limits.line_bytes:
                    where = f"{path}: row {number + 1}"
                    raise DataError(f"is over {limits.line_mib} MiB long (limits.line_mib)", where=where)
                for row in rows.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row


def _judged(
    footer: Any, path: Path, limits: ReadLimits, columns: Sequence[str] | None
) -> tuple[list[str], int, list[str]]:
    """The columns that are there, the rows to unpack at a time, and the parts of columns that have a dictionary.

    Raises DataError for a file that says it holds more than `limits` allow.
    """
    if footer.num_rows > limits.rows:
        raise DataError(f"has {footer.num_rows} rows, over {limits.rows} (limits.rows)", where=path)
    known = footer.schema.to_arrow_schema().names
    present = [name for name in dict.fromkeys(known if columns is None else columns) if name in known]
    total, num_rows, packed = 0, BATCH_ROWS, set()
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        of_group = 0
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in present:
                continue
            of_group += chunk.total_uncompressed_size
            if chunk.total_uncompressed_size > COLUMN_CHUNK_BYTES:
                message = (
                    f"row group {number} has {chunk.total_uncompressed_size >> 20} MiB of it; at most 1024 are read"
                )
                raise DataError(message, where=path, field=chunk.path_in_schema)
            if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY":
                packed.add(chunk.path_in_schema)
        total += of_group
        num_rows = min(num_rows, max(1, BATCH_BYTES * group.num_rows // max(1, of_group)))
    if total > limits.file_bytes:
        raise DataError(f"unpacks to {total >> 30} GiB, over {limits.file_gib} (limits.file_gib)", where=path)
    return present, num_rows, sorted(packed)


def _pieces(batch: Any, most: int) -> Iterator[Any]:
    """The batch, or where its texts together are over `most` bytes its rows one by one."""
    if _num_bytes(batch) <= most:
        yield batch
        return
    for place in range(batch.num_rows):
        yield batch.slice(place, 1)


def _num_bytes(table: Any) -> int:
    return sum(map(_bytes_of_texts, table.columns))


def _bytes_of_texts(array: Any) -> int:
    """Bytes of an array's texts when they are written out, a dictionary's as often as they are named."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        return int(pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return int(pc.sum(pc.binary_length(array)).as_py() or 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _bytes_of_texts(array.flatten())
    if pa.types.is_struct(kind):
        return sum(map(_bytes_of_texts, array.flatten()))
    return int(array.nbytes)
