"""Checkpoints of a run in progress, through torch.distributed.checkpoint: saved under one layout, loaded under any.

Every rank writes its own parts of weights and moments, each number once; what a rank needs under another layout it
reads out of the parts that overlap its own. `checkpoint.json` holds the rest: the step, the position in the data, what
the run learns from, its log, and the size of every file.

A checkpoint is a folder `step-NNNNNNNN`. It is written as `.step-NNNNNNNN.part` and gets its name when all ranks are
done and all of it is on the disk; one that does not have its name, or whose files are not those that
`checkpoint.json` says, does not count. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distill.errors import CheckpointError, EnvironmentFault
from distill.failpoints import failpoint
from distill.manifest import environment_faults, sync_folder, write_atomically
from teacher.parallel.groups import lost_peers

RECORD = "checkpoint.json"
PREFIX = "step-"


class Checkpoint(NamedTuple):
    folder: Path
    record: dict[str, Any]


def complete(folder: Path) -> list[Checkpoint]:
    """Every complete checkpoint in `folder`, the newest first."""
    found = []
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            whole = all((path / name).stat().st_size == size for name, size in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if whole:
            found.append(Checkpoint(path, record))
    return found


def newest(folder: Path, world: dist.ProcessGroup) -> Checkpoint | None:
    """The one that rank 0 finds, on every rank. Collective."""
    found = complete(folder)[:1] if dist.get_rank() == 0 else []
    told: list[Any] = [found]
    with lost_peers(world):
        dist.broadcast_object_list(told, src=0, group=world)
    return Checkpoint(*told[0][0]) if told[0] else None


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any], *, keep: int, world: dist.ProcessGroup
) -> None:
    """Write the checkpoint after `step` steps and delete all but the newest `keep`. Collective.

    Raises EnvironmentFault for a lost rank or a full disk; the checkpoints that were there stay.
    """
    target = folder / f"{PREFIX}{step:08d}"
    part = target.with_name(f".{target.name}.part")
    is_first = dist.get_rank() == 0
    if is_first:
        with environment_faults(folder):
            for stale in folder.glob(f".{PREFIX}*.part"):
                shutil.rmtree(stale)
            part.mkdir(parents=True)
    with _faults(part, world):
        dist.barrier(group=world)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part), process_group=world)
    failpoint("checkpoint.written")
    if is_first:
        files = {path.name: path.stat().st_size for path in part.iterdir()}
        write_atomically(part / RECORD, json.dumps({**record, "step": step, "files": files}) + "\n")
        with environment_faults(folder):
            if target.exists():  # of a run that went on from an older one
                shutil.rmtree(target)
            part.replace(target)
            sync_folder(folder)
        failpoint("checkpoint.complete")
        for old in complete(folder)[keep:]:
            shutil.rmtree(old.folder, ignore_errors=True)
    with lost_peers(world):
        dist.barrier(group=world)


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], world: dist.ProcessGroup) -> None:
    """Fill `tensors` in place. Collective. Raises CheckpointError where something is missing or cannot be read."""
    with _faults(checkpoint.folder, world):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint.folder), process_group=world)


@contextmanager
def _faults(folder: Path, world: dist.ProcessGroup) -> Iterator[None]:
    with warnings.catch_warnings(), lost_peers(world):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own about its own
        try:
            yield
        except CheckpointException as exc:
            rank, (cause, _) = min(exc.failures.items())
            kind = EnvironmentFault if isinstance(cause, OSError) else CheckpointError
            raise kind(f"rank {rank}: {type(cause).__name__}: {cause}", where=folder) from exc
