"""Ledgers of several machines into one, by key.

Two different samples under one key (two machines asked a teacher that is not deterministic for the same sample) are a
conflict: the one with the lesser digest of its content stays, wherever it comes from. So the result depends on the set
of ledgers alone: not on their order, nor on how often or in which groups they are merged. What was stored is committed
batch by batch; a merge that is killed is run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from distill.errors import DataError
from distill.failpoints import failpoint
from distill.ledger import COLUMNS, KEYS_A_QUERY, Ledger, Row
from distill.progress import Progress, silent

DIGEST = len(COLUMNS)  # its place in a stored row


def merge_ledgers(target: Path, sources: Sequence[Path], progress: Progress | None = None) -> dict[str, int]:
    """Add what `sources` hold to the ledger `target`, which is made if need be; the sources stay as they are.

    Returns `samples` and `verdicts` (in the target now), `new` samples and `conflicts` (keys with two different ones).
    Raises DataError for a ledger that is not there, not sound, or being written, before anything is done.
    """
    for source in sources:
        if not source.is_file():
            raise DataError("no such ledger", where=source)
        if source.resolve() == target.resolve():
            raise DataError("is the ledger to merge into", where=source)
    counts = {"new": 0, "conflicts": 0}
    with ExitStack() as stack:
        # All are judged before the target is made.
        others = [stack.enter_context(Ledger.open(path)) for path in dict.fromkeys(map(Path.resolve, sources))]
        ledger = stack.enter_context(Ledger.open(target))
        for other in others:
            task_of = (progress or silent()).task(f"merge {other.path.name}", total=len(other), unit="samples")
            with task_of as task:
                for batch in _batches(other.scan()):
                    new, conflicts = _merge_samples(ledger, batch)
                    counts["new"] += new
                    counts["conflicts"] += conflicts
                    failpoint("merge.batch")
                    task.advance(len(batch))
            for batch in _batches(other.scan_verdicts()):
                ledger.add_verdict_rows(batch, least=True)
        return {"samples": len(ledger), "verdicts": ledger.num_verdicts(), **counts}


def _merge_samples(ledger: Ledger, batch: list[Row]) -> tuple[int, int]:
    digests = dict(zip((keys := [row[0] for row in batch]), ledger.digests(keys), strict=True))
    known = [(digests[row[0]], row[DIGEST]) for row in batch if digests[row[0]]]
    ledger.add_rows(batch, least=True)
    return len(batch) - len(known), sum(ours != theirs for ours, theirs in known)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, KEYS_A_QUERY)):
        yield batch
