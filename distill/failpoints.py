"""Places where a process can be made to die, so that tests kill it there instead of hoping to hit them.

`POTSTILL_FAILPOINT=name` ends the process by SIGKILL when it first comes to `failpoint("name")`, `name:3` at the third
time; `name/what` counts only where `what` passes by, the stage's name for instance. Without that variable a failpoint
does nothing. What a kill leaves behind is what a power cut would, but for the
pages that the kernel still writes.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "POTSTILL_FAILPOINT"
FAILPOINTS = (
    "stage.begun",  # by stage: the folder's old manifest is gone, the body has not begun
    "stage.ended",  # by stage: the body has ended, the manifest is not written
    "file.written",  # an atomic file's bytes are on the disk under its temporary name
    "file.renamed",  # it has its name, the folder is not synced
    "ledger.inserted",  # a batch is in the transaction, which is not committed
    "ledger.committed",  # it is committed, whoever added it has not heard of it
    "ledger.graded",  # verdicts are committed, likewise
    "ledger.migrated",  # a new or older file has this version's tables, not yet committed
    "merge.batch",  # a batch of another ledger's samples is in this one
    "export.pending",  # the pending list stands, no shard does
    "export.shard",  # a shard is written and listed
    "export.complete",  # all are, none is published
    "export.set_aside",  # the folder that was published has made room
    "export.renamed",  # the new one has its name, the pending list is still there
    "checkpoint.written",  # every rank has written its parts of a checkpoint, which has no name yet
    "step.ended",  # by step and rank (`12.0`): a step of pre-training over several ranks is done
    "checkpoint.complete",  # a training checkpoint is whole and marked so
)
_passed: Counter[str] = Counter()


def failpoint(name: str, what: str = "") -> None:
    """Die here if the environment says so."""
    assert name in FAILPOINTS, name
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    place, _, count = wanted.partition(":")
    if place in (name, f"{name}/{what}"):
        _passed[name] += 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
