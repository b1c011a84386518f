"""The ledger: every accepted sample once, whatever dies and whenever.

One SQLite file in WAL mode with `synchronous=FULL`: what `add` returned for is on the disk. A sample's key is the hash
of all that can change it, so a sample that comes twice (a teacher was asked again after a crash) is stored once, the
first one staying. Each row carries a digest of its content, checked when it is read.

One process writes at a time: an advisory lock on `<ledger>.lock` falls with the process that holds it, however it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.errors import DataError, EnvironmentFault
from distill.failpoints import failpoint
from distill.manifest import environment_faults
from distill.records import Trace

APPLICATION_ID = 0x507453  # marks the file as a ledger of ours
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE traces (
    key TEXT PRIMARY KEY,
    problem_id TEXT NOT NULL,
    sample_index INTEGER NOT NULL,
    text TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    num_prompt_tokens INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    teacher TEXT NOT NULL,
    digest TEXT NOT NULL
) STRICT;
"""
COLUMNS = tuple(Trace.model_fields)
KEYS_A_QUERY = 500
ENVIRONMENT = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_NOMEM", "SQLITE_PERM")


class Ledger:
    """Use as `with Ledger.open(path) as ledger:`. Errors are DataError (the file) or EnvironmentFault (the disk)."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create. Raises DataError where another process writes it, or where it is not a sound ledger."""
        with environment_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
        try:
            with _translated(path):
                connection = sqlite3.connect(path, isolation_level=None)
                try:
                    _prepare(connection, path)
                except BaseException:
                    connection.close()
                    raise
        except BaseException:
            os.close(lock)
            raise
        return cls(path, connection, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        try:
            with _translated(self.path):
                self._connection.close()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def __len__(self) -> int:
        with _translated(self.path):
            (count,) = self._connection.execute("SELECT count(*) FROM traces").fetchone()
            return int(count)

    def add(self, traces: Iterable[Trace]) -> int:
        """Store all of `traces` or none, durably, and return how many are new: a key that is there stays as it is."""
        rows = [_row(trace) for trace in traces]
        if not rows:
            return 0
        marks = ", ".join("?" * len(rows[0]))
        with _translated(self.path), self._transaction():
            before = self._connection.total_changes
            self._connection.executemany(f"INSERT OR IGNORE INTO traces VALUES ({marks})", rows)
            new = self._connection.total_changes - before
            failpoint("ledger.inserted")
        failpoint("ledger.committed")
        return new

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no sample yet, in their order, each once."""
        wanted = list(dict.fromkeys(keys))
        present: set[str] = set()
        for chunk in _chunks(wanted):
            present.update(row[0] for row in self._select("key", chunk))
        return [key for key in wanted if key not in present]

    def traces(self, keys: Iterable[str]) -> Iterator[Trace]:
        """The samples of `keys`, in that order. Raises DataError for a key without a sample or an altered row."""
        for chunk in _chunks(list(keys)):
            found = {row[0]: row for row in self._select("*", chunk)}
            for key in chunk:
                if key not in found:
                    raise DataError("has no such sample", where=self.path, field=key)
                yield self._trace(found[key])

    def _trace(self, row: tuple[Any, ...]) -> Trace:
        *values, digest = row
        if _digest(values) != digest:
            raise DataError("the row is not what was stored; the file is damaged", where=self.path, field=str(row[0]))
        return Trace.model_validate(dict(zip(COLUMNS, values, strict=True)))

    def _select(self, what: str, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        marks = ", ".join("?" * len(keys))
        with _translated(self.path):
            return self._connection.execute(f"SELECT {what} FROM traces WHERE key IN ({marks})", keys).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _locked(path: Path) -> int:
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError as exc:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise DataError(f"is being written by another process (pid {holder})", where=path) from exc
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the durability, check that the file is sound and ours, create the table in a new file."""
    connection.execute("PRAGMA synchronous = FULL")
    (fault,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        raise DataError(f"the file is damaged ({fault})", where=path)
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or tables):
        raise DataError("is a database, but not a ledger", where=path)
    if tables and version != SCHEMA_VERSION:
        raise DataError(f"has schema version {version}, this potstill reads {SCHEMA_VERSION}", where=path)
    connection.execute("PRAGMA journal_mode = WAL")
    if not tables:
        # One transaction: a kill in the middle leaves an empty file, which the next run takes for a new one.
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
            f"{SCHEMA} COMMIT;"
        )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        name = getattr(exc, "sqlite_errorname", None) or ""
        if name.startswith(ENVIRONMENT):
            raise EnvironmentFault(f"{exc}; free the disk and run the same command again", where=path) from exc
        if name.startswith("SQLITE_BUSY"):
            raise DataError("is being written by another process", where=path) from exc
        raise DataError(f"not a sound ledger ({exc})", where=path) from exc


def _row(trace: Trace) -> list[Any]:
    values = [getattr(trace, name) for name in COLUMNS]
    return [*values, _digest(values)]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), KEYS_A_QUERY):
        yield keys[start : start + KEYS_A_QUERY]
