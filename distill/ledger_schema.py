"""The ledger's tables, and how a file of an older potstill becomes one of this.

A migration runs in one transaction when the ledger is opened, so that a kill leaves the old file or the new one. What
is newer than this potstill, or is no ledger, is refused in one line.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from distill.errors import DataError
from distill.failpoints import failpoint

APPLICATION_ID = 0x507453  # marks the file as a ledger of ours
SCHEMA_VERSION = 2
VERDICTS = """
CREATE TABLE verdicts (
    key TEXT NOT NULL,
    grading TEXT NOT NULL,
    state TEXT NOT NULL,
    extracted TEXT,
    detail TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (key, grading)
) STRICT, WITHOUT ROWID;
"""
SCHEMA = f"""
CREATE TABLE traces (
    key TEXT PRIMARY KEY,
    problem_id TEXT NOT NULL,
    sample_index INTEGER NOT NULL,
    text TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    num_prompt_tokens INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    teacher TEXT NOT NULL,
    digest TEXT NOT NULL,
    logprobs BLOB
) STRICT;
{VERDICTS}
"""
# From the version that is the key to the next one. The new column comes last, where SQLite adds it without a rewrite.
MIGRATIONS = {1: f"ALTER TABLE traces ADD COLUMN logprobs BLOB; {VERDICTS}"}


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the durability, check that the file is sound and ours, and give it the tables of this version."""
    connection.execute("PRAGMA synchronous = FULL")
    _refuse_programs(connection, path)
    (fault,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        raise DataError(f"the file is damaged ({fault})", where=path)
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or tables):
        raise DataError("is a database, but not a ledger", where=path)
    if tables and not 1 <= version <= SCHEMA_VERSION:
        message = f"has schema version {version}, this potstill reads {min(MIGRATIONS)} to {SCHEMA_VERSION}"
        raise DataError(message, where=path)
    connection.execute("PRAGMA journal_mode = WAL")
    if not tables:
        # A kill in the middle leaves an empty file, which the next run takes for a new one.
        _in_one_transaction(connection, f"PRAGMA application_id = {APPLICATION_ID}; {SCHEMA}", SCHEMA_VERSION)
        return
    for old in range(version, SCHEMA_VERSION):
        _in_one_transaction(connection, MIGRATIONS[old], old + 1)


def _refuse_programs(connection: sqlite3.Connection, path: Path) -> None:
    """Views, triggers and generated columns are programs, which a merge would run; a ledger has none."""
    connection.execute("PRAGMA trusted_schema = OFF")
    programs = connection.execute("SELECT type, name FROM sqlite_schema WHERE type IN ('view', 'trigger')").fetchall()
    for table in ("traces", "verdicts"):
        columns = connection.execute("SELECT name FROM pragma_table_xinfo(?) WHERE hidden", (table,)).fetchall()
        programs += [("generated column", f"{table}.{name}") for (name,) in columns]
    if programs:
        kind, name = programs[0]
        raise DataError(f"has a {kind}, which a ledger has not", where=path, field=str(name))


def _in_one_transaction(connection: sqlite3.Connection, statements: str, version: int) -> None:
    connection.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {version};")
    failpoint("ledger.migrated")
    connection.execute("COMMIT")
