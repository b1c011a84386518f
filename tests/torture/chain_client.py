"""The other side of `chain_server` and `eval_server`: starts runs, kills them, and looks at what is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.ledger import Ledger
from distill.manifest import read_manifest
from tests.repository import REPOSITORY

STAGES = ("generate", "verify", "export", "curate")


class Chain:
    def __init__(self, process: subprocess.Popen[str], more: dict[str, str]) -> None:
        self._process = process
        self._more = more  # of every job
        self.seconds: Counter[str] = Counter()  # of each part, in the uninterrupted run
        self.killed_in: Counter[str] = Counter()
        self.turn = 0
        self.part = ""  # in which the last run ended

    def run(
        self, folder: Path, *, num_samples: int = 2, failpoint: str = "", kill: tuple[str, float] | None = None
    ) -> int:
        """One run, and how it ended. `kill`: SIGKILL so many seconds after this part has begun."""
        self.turn += 1
        job = {"folder": str(folder), "seed": self.turn, "num_samples": num_samples, "failpoint": failpoint}
        job |= self._more
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid, stage, since = 0, "", time.monotonic()
        while True:
            word, said = self._line()
            now = time.monotonic()
            if word == "pid":
                pid = int(said)
                continue
            if stage and kill is None and not failpoint:
                self.seconds[stage] += now - since
            if word == "end":
                self.part = stage
                if said == str(-signal.SIGKILL):
                    self.killed_in[stage] += 1
                return int(said)
            stage, since = said, now
            if kill is not None and stage == kill[0]:
                time.sleep(kill[1])
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                kill = (".", 0.0)

    def _line(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server is gone"
        word, _, said = line.strip().partition(" ")
        return word, said


@contextmanager
def chain_server(module: str = "tests.torture.chain_server", **more: str) -> Iterator[Chain]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    try:
        yield Chain(process, more)
    finally:
        process.communicate()


def result(folder: Path) -> dict[str, bytes]:
    """Every file that a later stage reads; the rest (ledger, manifests, logs) holds times or an order of arrival."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".json"))
    assert not [path for path in files if path.name.startswith(".")], "nothing half written is left"
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "manifest.json"}


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def lost(folder: Path) -> set[str]:
    """What was acknowledged and is not in the ledger."""
    with Ledger.open(folder / "generate" / "ledger.sqlite") as ledger:
        return set(ledger.missing(lines(folder / "acknowledged")))


def doubled(folder: Path) -> int:
    """Samples that the published traces hold more than once, and keys that the ledger does."""
    import pyarrow.parquet as pq

    keys = pq.read_table(folder / "generate" / "traces", columns=["key"])["key"].to_pylist()
    with Ledger.open(folder / "generate" / "ledger.sqlite") as ledger:
        stored = [row[0] for row in ledger.scan()]
    return len(keys) - len(set(keys)) + len(stored) - len(set(stored))


def _still_to_come(folder: Path) -> tuple[str, ...]:
    if read_manifest(folder / "generate") is None:
        return STAGES
    return ("verify", "curate") if read_manifest(folder / "curate" / "verify") is None else ("curate",)


def kill_at_random(chain: Chain, folder: Path, rng: random.Random, num_kills: int) -> int:
    """Run until it is complete, killed up to `num_kills` times on the way at random moments of random parts."""
    kills = 0
    while True:
        stage = rng.choice(_still_to_come(folder))
        kill = (stage, rng.uniform(0, 1.1) * chain.seconds[stage]) if kills < num_kills else None
        status = chain.run(folder, kill=kill)
        if status == -signal.SIGKILL:
            kills += 1
            if (folder / "generate" / "ledger.sqlite").exists():
                assert not lost(folder)
            continue
        assert status == 0
        assert read_manifest(folder / "curate") is not None
        return kills
