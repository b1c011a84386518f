"""Ledgers of an earlier potstill are read, later ones refused, and a kill in between leaves one or the other."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.failpoints import VARIABLE
from distill.ledger import Ledger
from distill.records import Trace, Verdict
from tests.distill.ledger_writer import KEYS, trace
from tests.repository import REPOSITORY

# As potstill 0.1 first wrote it: no logprobs, no verdicts.
VERSION_1 = """
PRAGMA application_id = 5272659; PRAGMA user_version = 1; PRAGMA journal_mode = WAL;
CREATE TABLE traces (
    key TEXT PRIMARY KEY, problem_id TEXT NOT NULL, sample_index INTEGER NOT NULL, text TEXT NOT NULL,
    finish_reason TEXT NOT NULL, num_prompt_tokens INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    teacher TEXT NOT NULL, digest TEXT NOT NULL
) STRICT;
"""


def version_1(path: Path, count: int = 50) -> Path:
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
        for index in range(count):
            values = list(trace(index).model_dump(exclude={"logprobs"}).values())
            digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()
            connection.execute("INSERT INTO traces VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [*values, digest])
    connection.close()
    return path


def test_a_ledger_of_the_first_version_is_read_and_takes_what_is_new(tmp_path: Path) -> None:
    with Ledger.open(version_1(tmp_path / "l.sqlite")) as ledger:
        assert list(ledger.traces(KEYS[:50])) == [trace(index) for index in range(50)]
        new = trace(50).model_copy(update={"logprobs": "[[1,-0.5]]"})
        assert ledger.add([new]) == 1
        assert ledger.add_verdicts([(KEYS[0], "g", Verdict(state="correct"))]) == 1
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        assert list(ledger.traces([KEYS[50], KEYS[0]])) == [new, trace(0)]
        assert ledger.verdicts([(KEYS[0], "g")]) == {KEYS[0]: Verdict(state="correct")}


def test_a_kill_in_the_migration_leaves_the_old_file(tmp_path: Path) -> None:
    path = version_1(tmp_path / "l.sqlite")
    killed = subprocess.run(
        [sys.executable, "-m", "tests.distill.ledger_writer", path, "0", "0"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), VARIABLE: "ledger.migrated"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'verdicts'").fetchone() == (0,)
    connection.close()
    with Ledger.open(path) as ledger:
        assert list(ledger.traces(KEYS[:50])) == [trace(index) for index in range(50)]


@pytest.mark.parametrize("version", [0, 3, 9])
def test_a_version_that_is_not_known_is_refused_and_left_alone(tmp_path: Path, version: int) -> None:
    path = version_1(tmp_path / "l.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match=rf"l\.sqlite: has schema version {version}, this potstill reads 1 to 2$"):
        Ledger.open(path)
    assert path.read_bytes() == before


def test_logprobs_are_kept_whole_and_small(tmp_path: Path) -> None:
    text = json.dumps([[[index, -0.125 * index] for index in range(20)] for _ in range(300)], separators=(",", ":"))
    with_logprobs = trace(1).model_copy(update={"logprobs": text})
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        ledger.add([with_logprobs, trace(2)])
        assert list(ledger.traces(KEYS[1:3])) == [with_logprobs, trace(2)]
    assert (tmp_path / "l.sqlite").stat().st_size < len(text)
    with sqlite3.connect(tmp_path / "l.sqlite") as connection:
        connection.execute("UPDATE traces SET logprobs = NULL WHERE key = ?", [KEYS[1]])
    connection.close()
    with Ledger.open(tmp_path / "l.sqlite") as ledger, pytest.raises(DataError, match=f"{KEYS[1]}: the row is not"):
        list(ledger.traces([KEYS[1]]))


def test_verdicts_are_stored_once_a_grading_and_our_own_failures_never(tmp_path: Path) -> None:
    first, other = Verdict(state="correct", extracted="7"), Verdict(state="wrong", detail="score 0")
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        assert ledger.add_verdicts([("a", "g1", first), ("a", "g2", other), ("b", "g1", other)]) == 3
        assert ledger.add_verdicts([("a", "g1", other), ("c", "g1", Verdict(state="infra_error"))]) == 0
        assert ledger.verdicts([("a", "g1"), ("b", "g2"), ("c", "g1")]) == {"a": first}
        assert ledger.verdicts([("a", "g2"), ("b", "g1")]) == {"a": other, "b": other}
    with sqlite3.connect(tmp_path / "l.sqlite") as connection:
        connection.execute("UPDATE verdicts SET state = 'correct' WHERE key = 'b'")
    connection.close()
    with Ledger.open(tmp_path / "l.sqlite") as ledger, pytest.raises(DataError, match="b: the row is not"):
        ledger.verdicts([("b", "g1")])


def test_every_field_of_a_trace_is_stored(tmp_path: Path) -> None:
    """A field that is added to Trace and not to the ledger would be lost in silence."""
    with Ledger.open(tmp_path / "l.sqlite") as ledger:
        ledger.add([trace(3)])
        (values,) = ledger.rows([KEYS[3]])
    assert dict(zip(Trace.model_fields, values, strict=True)) == trace(3).model_dump()
