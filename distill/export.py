"""Traces from the ledger to a folder of Parquet shards, in two phases, so that no reader ever sees half of it.

    .traces.pending.json    the pending list: what is being published, every finished shard by its hash
    .traces.pending/        the shards, as they are written
    traces/                 part-00000.parquet ...: the last whole export

First the shards are written beside the folder, each entered into the list when it is on the disk; then the folder that
was there is set aside and the new one takes its name. Killed at any moment, the same call goes on: shards that are
listed, whose bytes have the listed hash and whose samples are still those of the ledger are kept, the rest is written
again. The bytes depend on the samples and their order alone. One row group is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from distill.failpoints import failpoint
from distill.ledger import Ledger, Row
from distill.manifest import atomic_file, hash_file, sync_folder, write_atomically
from distill.progress import Task
from distill.records import Trace, content_id
from distill.tables import ROW_GROUP, schema_of, shard_name

GROUP_BYTES = 64 << 20  # text of a row group: 4,096 answers of 32k tokens would be half a gigabyte
SHARD_ROWS = 16 * ROW_GROUP
SHARD_BYTES = 1 << 30  # text of a shard, before compression
TEXT, FINISH, TOKENS, LOGPROBS = (
    list(Trace.model_fields).index(name) for name in ("text", "finish_reason", "num_tokens", "logprobs")
)


class Shard(BaseModel):
    name: str
    sha256: str
    samples: str  # hash of the keys and the ledger's digests
    num_rows: int
    num_tokens: int
    num_truncated: int


class Pending(BaseModel):
    wanted: str  # hash of all keys in their order
    shards: list[Shard]


def export_traces(
    ledger: Ledger, keys: Callable[[], Iterator[str]], folder: Path, task: Task | None = None
) -> dict[str, int]:
    """Publish the samples of `keys()` as `folder` and return how many samples, tokens and truncated ones there are.

    `keys` is called more than once and must give the same each time. Raises DataError for a key without a sample or a
    row that was altered, EnvironmentFault for a full disk; what was in `folder` before is there until the new is whole.
    """
    listing = folder.with_name(f".{folder.name}.pending.json")
    staging = folder.with_name(f".{folder.name}.pending")
    aside = folder.with_name(f".{folder.name}.old")
    pending = _read(listing, wanted := _hash_lines(keys()))
    if pending is None:
        shutil.rmtree(staging, ignore_errors=True)
        pending = Pending(wanted=wanted, shards=[])
        _write(listing, pending)
        failpoint("export.pending")
    if not _is_published(ledger, pending, keys(), staging, folder):
        kept = _still_good(ledger, pending.shards, keys(), staging)
        num_kept = sum(shard.num_rows for shard in kept)
        pending.shards = kept
        _clean(staging, kept)
        if task is not None:
            task.advance(num_kept)
        for shard in _shards(ledger, islice(keys(), num_kept, None), staging, len(kept), task):
            pending.shards.append(shard)
            _write(listing, pending)
            failpoint("export.shard")
        _publish(staging, folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    listing.unlink()
    return {
        "samples": sum(shard.num_rows for shard in pending.shards),
        "tokens": sum(shard.num_tokens for shard in pending.shards),
        "truncated": sum(shard.num_truncated for shard in pending.shards),
    }


def _publish(staging: Path, folder: Path, aside: Path) -> None:
    failpoint("export.complete")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        failpoint("export.set_aside")
    staging.rename(folder)
    sync_folder(folder.parent)
    failpoint("export.renamed")


def _is_published(ledger: Ledger, pending: Pending, keys: Iterator[str], staging: Path, folder: Path) -> bool:
    """Tell whether the kill came after the renaming: all that is listed lies in the published folder, nothing else."""
    if staging.exists() or not pending.shards:
        return False
    return len(_still_good(ledger, pending.shards, keys, folder)) == len(pending.shards) and next(keys, None) is None


def _still_good(ledger: Ledger, shards: list[Shard], keys: Iterator[str], where: Path) -> list[Shard]:
    """The listed shards, up to the first that is not as it was listed."""
    good = []
    for shard in shards:
        path = where / shard.name
        of_shard = list(islice(keys, shard.num_rows))
        if not path.is_file() or hash_file(path) != shard.sha256:
            break
        if _hash_lines(_with_digests(of_shard, ledger.digests(of_shard))) != shard.samples:
            break
        good.append(shard)
    return good


def _shards(ledger: Ledger, keys: Iterable[str], folder: Path, first: int, task: Task | None) -> Iterator[Shard]:
    """Write shard after shard; with nothing to write, one that is empty, so that readers find the columns."""
    groups = _groups(ledger.rows(keys))
    number = first
    group = next(groups, [])
    while group or number == 0:
        path = folder / shard_name(number)
        rows = num_bytes = num_tokens = num_truncated = 0
        of_shard: list[str] = []
        with atomic_file(path) as file, pq.ParquetWriter(file, schema_of(Trace), compression="zstd") as writer:
            while group and rows < SHARD_ROWS and num_bytes < SHARD_BYTES:
                writer.write_table(_table(group))
                rows += len(group)
                num_bytes += sum(map(_num_bytes, group))
                num_tokens += sum(row[TOKENS] for row in group)
                num_truncated += sum(row[FINISH] == "length" for row in group)
                of_shard += [row[0] for row in group]
                if task is not None:
                    task.advance(len(group))
                group = next(groups, [])
        yield Shard(
            name=path.name,
            sha256=hash_file(path),
            samples=_hash_lines(_with_digests(of_shard, ledger.digests(of_shard))),
            num_rows=rows,
            num_tokens=num_tokens,
            num_truncated=num_truncated,
        )
        number += 1


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Row groups: as many rows as fit both limits, at least one."""
    group: list[Row] = []
    num_bytes = 0
    for row in rows:
        size = _num_bytes(row)
        if group and (len(group) == ROW_GROUP or num_bytes + size > GROUP_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(row)
        num_bytes += size
    if group:
        yield group


def _num_bytes(row: Row) -> int:
    return len(row[TEXT]) + len(row[LOGPROBS] or "")


def _table(rows: list[Row]) -> Any:
    schema = schema_of(Trace)
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
    )


def _clean(staging: Path, kept: list[Shard]) -> None:
    """Leave nothing but the shards that are kept: what a kill left half written would be published with them."""
    staging.mkdir(parents=True, exist_ok=True)
    names = {shard.name for shard in kept}
    for path in staging.iterdir():
        if path.name not in names:
            path.unlink()


def _read(listing: Path, wanted: str) -> Pending | None:
    """The list, unless it is of other samples or not as it was written."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        tree = json.loads(listing.read_bytes())
        pending = Pending.model_validate(tree["pending"])
        if tree["hash"] == content_id(pending.model_dump()) and pending.wanted == wanted:
            return pending
    return None


def _write(listing: Path, pending: Pending) -> None:
    tree = pending.model_dump()
    write_atomically(listing, json.dumps({"hash": content_id(tree), "pending": tree}, indent=1) + "\n")


def _with_digests(keys: Iterable[str], digests: Iterable[str]) -> Iterator[str]:
    return (f"{key} {digest}" for key, digest in zip(keys, digests, strict=True))


def _hash_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
