"""Traces as a data set: Parquet shards that `datasets.load_dataset(folder)` reads and TRL trains on as they are.

    data/train-00000-of-00004.parquet    the configuration `default`: samples that became training examples
    all/train-00000-of-00009.parquet     the configuration `all`: every sample, with the filter that dropped it

Names, folders and the `messages` column are those that `datasets` and TRL expect, so neither needs a loading script.
Rows are written in the order of the traces, one row group in memory; the bytes depend on the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from distill.curate import DroppedTrace
from distill.manifest import environment_faults
from distill.records import Problem, Trace, Verdict

DEFAULT, ALL = "default", "all"
FOLDERS = {DEFAULT: "data", ALL: "all"}
ROW_GROUP = 1_000  # what the Hub's viewer reads at once
GROUP_BYTES = 64 << 20
PROCEDURAL_LICENCE = "apache-2.0"  # reasoning-gym's, whose generators wrote the question
UNKNOWN_LICENCE = "unknown"

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COLUMNS: dict[str, tuple[Any, str]] = {
    "messages": (MESSAGES, "the question as the user's turn, the trace as the assistant's, its `<think>` kept"),
    "problem_id": (pa.string(), "hash of the question's text, its reference and its grader"),
    "answer": (pa.string(), "the reference answer as the source gives it; null where it has none"),
    "source": (pa.string(), "the family or data set that the question comes from"),
    "licence": (pa.string(), "the licence of that source"),
    "sample_index": (pa.int64(), "which of the samples of its question, from 0"),
    "verdict": (pa.string(), "correct, wrong, unverifiable, truncated, timeout or infra_error"),
    "relabelled": (pa.bool_(), "correct by the majority of the question's samples, against the reference"),
    "hinted": (pa.bool_(), "asked with the reference as a hint, which the question here does not show"),
    "finish_reason": (pa.string(), "`stop`, or `length` where the token limit cut the sample off"),
    "num_prompt_tokens": (pa.int64(), "tokens of the prompt, by the teacher's tokenizer"),
    "num_tokens": (pa.int64(), "tokens that the teacher wrote"),
    "teacher": (pa.string(), "the teacher's name"),
    "trace_key": (pa.string(), "hash of all that can change the sample: problem, teacher, sampling, sample index"),
}
REJECTED_COLUMNS: dict[str, tuple[Any, str]] = {
    "dropped_by": (pa.string(), "only in `all`: the filter that dropped the sample; null where it was kept"),
    "reason": (pa.string(), "only in `all`: what that filter saw"),
}


@dataclass
class SourceCount:
    licence: str
    num_traces: int = 0
    num_kept: int = 0


@dataclass(frozen=True)
class DatasetLayout:
    """The data set that was written: rows and bytes of the tables in memory by configuration, samples by source."""

    num_rows: dict[str, int]
    num_bytes: dict[str, int]
    sources: dict[str, SourceCount]


def columns(config: str) -> dict[str, tuple[Any, str]]:
    return {**COLUMNS, **REJECTED_COLUMNS} if config == ALL else COLUMNS


def schema(config: str) -> Any:
    return pa.schema([pa.field(name, kind) for name, (kind, _) in columns(config).items()])


def lay_out(
    samples: Iterable[tuple[Problem, Trace, Verdict, DroppedTrace | None]],
    folder: Path,
    *,
    licences: Mapping[str, str],
    include_rejected: bool,
    shard_bytes: int,
) -> DatasetLayout:
    """Write the shards below `folder`. `licences` maps sources to their licences; procedural ones need none."""
    configs = (DEFAULT, ALL) if include_rejected else (DEFAULT,)
    writers = {config: Shards(folder / FOLDERS[config], schema(config), shard_bytes) for config in configs}
    sources: dict[str, SourceCount] = {}
    try:
        for problem, trace, verdict, dropped in samples:
            count = sources.setdefault(problem.source, SourceCount(_licence(problem, licences)))
            count.num_traces += 1
            row = _row(problem, trace, verdict, count.licence)
            if dropped is None:
                count.num_kept += 1
                writers[DEFAULT].write(row)
            if include_rejected:
                fate = (None, None) if dropped is None else (dropped.filter, dropped.detail)
                writers[ALL].write({**row, **dict(zip(REJECTED_COLUMNS, fate, strict=True))})
    finally:
        for writer in writers.values():
            writer.close()
    for writer in writers.values():
        writer.name_shards()
    return DatasetLayout(
        {config: writer.num_rows for config, writer in writers.items()},
        {config: writer.num_bytes for config, writer in writers.items()},
        dict(sorted(sources.items())),
    )


def pair_with_drops(
    samples: Iterable[tuple[Problem, Trace, Verdict]], dropped: Iterable[DroppedTrace]
) -> Iterator[tuple[Problem, Trace, Verdict, DroppedTrace | None]]:
    """Each sample with what dropped it; `dropped` stands in the order of the samples, as curation leaves it."""
    waiting = iter(dropped)
    following = next(waiting, None)
    for problem, trace, verdict in samples:
        if following is not None and following.key == trace.key:
            yield problem, trace, verdict, following
            following = next(waiting, None)
        else:
            yield problem, trace, verdict, None
    assert following is None, "a dropped sample that there is not"


class Shards:
    """Rows into files of about `shard_bytes` each (uncompressed), named at the end, when their number is known."""

    def __init__(self, folder: Path, schema: Any, shard_bytes: int) -> None:
        self.num_rows = self.num_bytes = 0
        self._folder, self._schema, self._shard_bytes = folder, schema, shard_bytes
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = self._shard_size = self._num_shards = 0
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._group_bytes += sum(len(message["content"]) for message in row["messages"])
        if len(self._rows) == ROW_GROUP or self._group_bytes >= min(GROUP_BYTES, self._shard_bytes):
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._file is None and not self._num_shards:
            self._open()  # a configuration without rows is a table without rows, not a missing file
        self._close_file()

    def name_shards(self) -> None:
        for number in range(self._num_shards):
            name = f"train-{number:05d}-of-{self._num_shards:05d}.parquet"
            self._path(number).rename(self._folder / name)

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        if self._file is not None and self._shard_size + table.nbytes > self._shard_bytes:
            self._close_file()
        if self._file is None:
            self._open()
        self._file.write_table(table)
        self._shard_size += table.nbytes
        self.num_rows += table.num_rows
        self.num_bytes += table.nbytes
        self._rows, self._group_bytes = [], 0

    def _open(self) -> None:
        with environment_faults(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(self._path(self._num_shards), self._schema, compression="zstd")
        self._num_shards += 1

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._shard_size = None, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"train-{number:05d}.parquet"


def _row(problem: Problem, trace: Trace, verdict: Verdict, licence: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": trace.text}],
        "problem_id": trace.problem_id,
        "answer": problem.answer,
        "source": problem.source,
        "licence": licence,
        "sample_index": trace.sample_index,
        "verdict": verdict.state,
        "relabelled": verdict.relabelled,
        "hinted": trace.hinted,
        "finish_reason": trace.finish_reason,
        "num_prompt_tokens": trace.num_prompt_tokens,
        "num_tokens": trace.num_tokens,
        "teacher": trace.teacher,
        "trace_key": trace.key,
    }


def _licence(problem: Problem, licences: Mapping[str, str]) -> str:
    default = PROCEDURAL_LICENCE if problem.grader == "reasoning_gym" else UNKNOWN_LICENCE
    return licences.get(problem.source, default)
