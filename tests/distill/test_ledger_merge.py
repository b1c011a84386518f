"""Merging ledgers: the result depends on the set of ledgers alone."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.failpoints import VARIABLE
from distill.ledger import Ledger
from distill.ledger_merge import merge_ledgers
from distill.records import Trace, Verdict
from tests.distill.ledger_writer import KEYS, trace
from tests.distill.test_ledger_schema import version_1
from tests.repository import REPOSITORY


def worker(path: Path, indices: range, text: str = "") -> Path:
    """A ledger whose samples with a number that 10 divides say something of their own."""
    with Ledger.open(path) as ledger:
        ledger.add(trace(index, f"{text} {index}" if index % 10 == 0 else "") for index in indices)
        ledger.add_verdicts((KEYS[index], "g", Verdict(state="correct", detail=text[:1])) for index in indices)
    return path


@pytest.fixture
def workers(tmp_path: Path) -> list[Path]:
    return [
        worker(tmp_path / "a.sqlite", range(1_000), "alpha"),
        worker(tmp_path / "b.sqlite", range(900, 1_500), "beta"),
        worker(tmp_path / "c.sqlite", range(950, 1_600, 2), "gamma"),
    ]


def content(path: Path) -> tuple[list[Trace], dict[str, Verdict]]:
    with Ledger.open(path) as ledger:
        keys = sorted(row[0] for row in ledger.scan())
        return list(ledger.traces(keys)), ledger.verdicts((key, "g") for key in keys)


def test_all_orders_groups_and_repetitions_give_the_same(workers: list[Path], tmp_path: Path) -> None:
    results = []
    for number, order in enumerate(permutations(workers)):
        target = tmp_path / f"merged-{number}.sqlite"
        counts = merge_ledgers(target, list(order))
        results.append(content(target))
        assert counts["samples"] == counts["new"] == counts["verdicts"] == 1_550
        assert 60 <= counts["conflicts"] <= 70
        assert merge_ledgers(target, list(order))["new"] == 0
        assert content(target) == results[-1]
    step = tmp_path / "step.sqlite"
    merge_ledgers(step, workers[1:])
    merge_ledgers(workers[0], [step])  # into one that holds samples itself
    results.append(content(workers[0]))
    assert all(result == results[0] for result in results)
    assert {one.text.split()[0] for one in results[0][0] if one.num_tokens in range(950, 1_000, 10)} <= {
        *("alpha", "beta", "gamma")
    }


def test_samples_in_conflict_are_counted_and_one_stays_whole(tmp_path: Path) -> None:
    one, two = worker(tmp_path / "1.sqlite", range(20), "one"), worker(tmp_path / "2.sqlite", range(20), "two")
    assert merge_ledgers(one, [two, two]) == {"samples": 20, "verdicts": 20, "new": 0, "conflicts": 2}
    texts = [t.text for t in content(one)[0]]
    assert all(text in (f"one {index}", f"two {index}") for index, text in ((0, texts[0]), (10, texts[10])))


def test_a_settled_verdict_stays_before_a_time_out(tmp_path: Path) -> None:
    paths = [tmp_path / "slow.sqlite", tmp_path / "fast.sqlite"]
    for path, state in zip(paths, ("timeout", "correct"), strict=True):
        with Ledger.open(path) as ledger:
            ledger.add_verdicts((key, "g", Verdict(state=state)) for key in KEYS[:40])
    for number, order in enumerate((paths, paths[::-1])):
        merge_ledgers(tmp_path / f"{number}.sqlite", order)
        with Ledger.open(tmp_path / f"{number}.sqlite") as ledger:
            states = [one.state for one in ledger.verdicts((key, "g") for key in KEYS[:40]).values()]
        assert states == ["correct"] * 40


def test_a_killed_merge_is_run_again(workers: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "out.sqlite"
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "ledger", "merge", target, *workers]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run(command, env={**environment, VARIABLE: "merge.batch:3"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{target}: samples 1550, verdicts 1550, new ")
    merge_ledgers(tmp_path / "straight.sqlite", workers)
    assert content(target) == content(tmp_path / "straight.sqlite")


def test_older_ledgers_are_taken_and_what_is_none_is_refused(workers: list[Path], tmp_path: Path) -> None:
    old = version_1(tmp_path / "old.sqlite")
    assert merge_ledgers(tmp_path / "out.sqlite", [old])["new"] == 50
    before = content(tmp_path / "out.sqlite")
    with pytest.raises(DataError, match=r"none\.sqlite: no such ledger"):
        merge_ledgers(tmp_path / "out.sqlite", [workers[0], tmp_path / "none.sqlite"])
    with pytest.raises(DataError, match=r"a\.sqlite: is the ledger to merge into"):
        merge_ledgers(workers[0], [workers[0]])
    with Ledger.open(workers[0]), pytest.raises(DataError, match=r"a\.sqlite: is being written"):
        merge_ledgers(tmp_path / "out.sqlite", [workers[0]])
    damaged = shutil.copy(workers[0], tmp_path / "damaged.sqlite")
    with sqlite3.connect(damaged) as connection:
        connection.execute("UPDATE traces SET text = 'x' WHERE key = ?", [KEYS[3]])
    connection.close()
    with pytest.raises(DataError, match=rf"damaged\.sqlite: {KEYS[3]}: the row is not what was stored"):
        merge_ledgers(tmp_path / "out.sqlite", [damaged])
    assert content(tmp_path / "out.sqlite") == before
