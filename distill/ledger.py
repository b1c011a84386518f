"""The ledger: every accepted sample once, whatever dies and whenever.

One SQLite file in WAL mode with `synchronous=FULL`: what `add` returned for is on the disk. A sample's key is the hash
of all that can change it, so a sample that comes twice (a teacher was asked again after a crash) is stored once, the
first one staying. Beside the samples stand their verdicts, so that grading is not done again either. Each row carries a
digest of its content, checked when it is read.

One process writes at a time: an advisory lock on `<ledger>.lock` falls with the process that holds it, however it dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.errors import DataError, EnvironmentFault
from distill.failpoints import failpoint
from distill.file_lock import take_lock
from distill.ledger_schema import prepare
from distill.manifest import environment_faults
from distill.records import Trace, Verdict

# What a row says, in the order of its digest; logprobs stand last, compressed, after the digest.
COLUMNS = ("key", "problem_id", "sample_index", "text", "finish_reason", "num_prompt_tokens", "num_tokens", "teacher")
Row = tuple[Any, ...]
KEYS_A_QUERY = 500
MAX_VALUE_BYTES = 256 << 20  # of one text; twenty logprobs at each of 100,000 tokens have 40 MB
ENVIRONMENT = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_NOMEM", "SQLITE_PERM")


class Ledger:
    """Use as `with Ledger.open(path) as ledger:`. Errors are DataError (the file) or EnvironmentFault (the disk).

    Any thread may use it, one at a time.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create. Raises DataError where another process writes it, or where it is not a sound ledger."""
        with environment_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path.with_name(path.name + ".lock"), of=path)
        try:
            with _sqlite_faults(path):
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
                try:
                    prepare(connection, path)
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
            with _sqlite_faults(self.path):
                self._connection.close()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def __len__(self) -> int:
        return self._count("traces")

    def num_verdicts(self) -> int:
        return self._count("verdicts")

    def _count(self, table: str) -> int:
        with _sqlite_faults(self.path):
            (count,) = self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            return int(count)

    def add(self, traces: Iterable[Trace]) -> int:
        """Store all of `traces` or none, durably, and return how many are new: a key that is there stays as it is."""
        return self.add_rows([_row(trace) for trace in traces])

    def add_rows(self, rows: Sequence[Row], *, least: bool = False) -> int:
        """`add` for rows as `scan` yields them. `least`: of two samples of a key the lesser digest stays."""
        what = "INTO traces VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        columns = (*COLUMNS, "digest", "logprobs")
        replace = ", ".join(f"{name} = excluded.{name}" for name in columns)
        if least:
            what += f" ON CONFLICT (key) DO UPDATE SET {replace} WHERE excluded.digest < traces.digest"
        return self._write(f"INSERT {'' if least else 'OR IGNORE '}{what}", rows)

    def present(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that have a sample."""
        return {row[0] for chunk in _chunks(keys) for row in self._select("key", "traces", chunk)}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no sample yet, in their order, each once."""
        wanted = list(dict.fromkeys(keys))
        present = self.present(wanted)
        return [key for key in wanted if key not in present]

    def traces(self, keys: Iterable[str]) -> Iterator[Trace]:
        """The samples of `keys`, in that order. Raises DataError for a key without a sample or an altered row."""
        for values in self.rows(keys):
            yield Trace.model_construct(**dict(zip(Trace.model_fields, values, strict=True)))

    def rows(self, keys: Iterable[str]) -> Iterator[Row]:
        """Yield the values of `traces` alone, in the order of Trace's fields. Holds `KEYS_A_QUERY` of them."""
        for chunk in _chunks(keys):
            found = {row[0]: row for row in self._select("*", "traces", chunk)}
            for key in chunk:
                if key not in found:
                    raise DataError("has no such sample", where=self.path, field=key)
                yield self._check(found[key])

    def digests(self, keys: Iterable[str]) -> Iterator[str]:
        """Digests of the samples at `keys`, in that order, in a few bytes each: equal digests are equal samples."""
        for chunk in _chunks(keys):
            found: dict[str, str] = dict(self._select("key, digest", "traces", chunk))
            yield from (found.get(key, "") for key in chunk)

    def scan(self) -> Iterator[Row]:
        """Every sample as it is stored, in the order of arrival. Raises DataError for an altered row."""
        with _sqlite_faults(self.path):
            for row in self._connection.execute("SELECT * FROM traces ORDER BY rowid"):
                self._check(row)
                yield row

    def add_verdicts(self, verdicts: Iterable[tuple[str, str, Verdict]]) -> int:
        """Store `(key, grading, verdict)`s durably, the first of each pair staying; return how many are new.

        `grading` is the hash of all that can change the verdict (see `distill.grading`). A fault of ours is no verdict
        that should outlast its cause: `infra_error` is left out.
        """
        rows = []
        for key, grading, verdict in verdicts:
            if verdict.state != "infra_error":
                values = [key, grading, verdict.state, verdict.extracted, verdict.detail]
                rows.append((*values, _digest(values)))
        return self.add_verdict_rows(rows)

    def add_verdict_rows(self, rows: Sequence[Row], *, least: bool = False) -> int:
        """`add_verdicts` for rows as `scan_verdicts` yields them. `least`: as in `add_rows`, time-outs last."""
        what = "INTO verdicts VALUES (?, ?, ?, ?, ?, ?)"
        if least:
            what += """ ON CONFLICT (key, grading) DO UPDATE SET state = excluded.state, extracted = excluded.extracted,
                detail = excluded.detail, digest = excluded.digest
                WHERE (excluded.state = 'timeout', excluded.digest) < (verdicts.state = 'timeout', verdicts.digest)"""
        return self._write(f"INSERT {'' if least else 'OR IGNORE '}{what}", rows, done="ledger.graded")

    def verdicts(self, pairs: Iterable[tuple[str, str]]) -> dict[str, Verdict]:
        """Known verdicts on `(key, grading)` pairs, by key. Raises DataError for an altered row."""
        wanted = dict(pairs)
        found = {}
        for chunk in _chunks(wanted):
            for row in self._select("*", "verdicts", chunk):
                if wanted[row[0]] == row[1]:
                    self._check_verdict(row)
                    found[row[0]] = Verdict(state=row[2], extracted=row[3], detail=row[4])
        return found

    def scan_verdicts(self) -> Iterator[Row]:
        """Every verdict as it is stored, by key. Raises DataError for an altered row."""
        with _sqlite_faults(self.path):
            for row in self._connection.execute("SELECT * FROM verdicts ORDER BY key, grading"):
                self._check_verdict(row)
                yield row

    def _check(self, row: Row) -> Row:
        *values, digest, packed = row
        try:
            logprobs = None if packed is None else _unpacked(packed).decode()
        except (zlib.error, UnicodeDecodeError) as exc:
            raise self._altered_row(row) from exc
        if _digest(values if logprobs is None else [*values, logprobs]) != digest:
            raise self._altered_row(row)
        return (*values, logprobs)

    def _check_verdict(self, row: Row) -> None:
        if _digest(row[:-1]) != row[-1]:
            raise self._altered_row(row)

    def _altered_row(self, row: Row) -> DataError:
        return DataError("the row is not what was stored; the file is damaged", where=self.path, field=str(row[0]))

    def _select(self, what: str, table: str, keys: Sequence[str]) -> list[Row]:
        marks = ", ".join("?" * len(keys))
        with _sqlite_faults(self.path):
            return self._connection.execute(f"SELECT {what} FROM {table} WHERE key IN ({marks})", keys).fetchall()

    def _write(self, statement: str, rows: Sequence[Row], *, done: str = "ledger.committed") -> int:
        if not rows:
            return 0
        with _sqlite_faults(self.path), self._transaction():
            before = self._connection.total_changes
            self._connection.executemany(statement, rows)
            new = self._connection.total_changes - before
            failpoint("ledger.inserted")
        failpoint(done)
        return new

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


@contextmanager
def _sqlite_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        name = getattr(exc, "sqlite_errorname", None) or ""
        if name.startswith(ENVIRONMENT):
            raise EnvironmentFault(f"{exc}; free the disk and run the same command again", where=path) from exc
        if name.startswith("SQLITE_BUSY"):
            raise DataError("is being written by another process", where=path) from exc
        raise DataError(f"not a sound ledger ({exc})", where=path) from exc


def _row(trace: Trace) -> Row:
    values = [getattr(trace, name) for name in COLUMNS]
    if trace.logprobs is None:
        return (*values, _digest(values), None)
    return (*values, _digest([*values, trace.logprobs]), zlib.compress(trace.logprobs.encode()))


def _unpacked(packed: bytes) -> bytes:
    """Raises zlib.error for what is not whole, and for a row that would fill the memory."""
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(packed, MAX_VALUE_BYTES)
    if not unpacking.eof:
        raise zlib.error("not whole, or too large")
    return text


def _digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(keys)
    while chunk := list(islice(remaining, KEYS_A_QUERY)):
        yield chunk
