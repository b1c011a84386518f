"""Looking for a secret wherever it could have gone: files (packed ones unpacked), output, command lines."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from tests.processes import command_lines


def places_with(secret: str, folder: Path, *outputs: str) -> list[str]:
    """Where the secret is found. `folder` is searched whole: raw bytes, rows of tables and ledgers, file names."""
    found = [f"output {number}" for number, text in enumerate(outputs) if secret in text]
    for path in sorted(folder.rglob("*")):
        if secret in path.name or (path.is_file() and any(secret.encode() in part for part in _parts(path))):
            found.append(str(path))
    return found


def command_lines_with(secret: str) -> list[str]:
    """Processes of this machine whose command line shows the secret."""
    lines = (line for _, line in command_lines() if secret.encode() in line)
    return [line.replace(b"\0", b" ").decode(errors="replace") for line in lines]


def _parts(path: Path) -> Iterator[bytes]:
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
    if path.suffix == ".sqlite":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            for table in tables:
                for row in connection.execute(f'SELECT * FROM "{table}"'):
                    for value in row:
                        yield _unpacked(value) if isinstance(value, bytes) else str(value).encode()


def _unpacked(value: bytes) -> bytes:
    try:
        return zlib.decompress(value)
    except zlib.error:
        return value
