"""Training examples as files have them: the columns of `Example`, or whole conversations in a column `messages`.

Of a conversation the last assistant turn is learned, or each of them as an example of its own: templates show earlier
turns without their reasoning, so that only as the last one does a turn look as it will when it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from distill.errors import DataError
from distill.records import Example
from distill.tables import iterate_records

CHUNK = 1024
MESSAGES = "messages"


def read_examples(path: Path) -> Iterator[list[Example]]:
    """Chunks of the examples of a Parquet file. Raises DataError naming file, row and field."""
    if not path.is_file():
        raise DataError("no such file of examples", where=path)
    has_conversations = MESSAGES in _metadata(path).schema.to_arrow_schema().names
    examples = _conversations(path) if has_conversations else iterate_records(path, Example)
    while chunk := list(islice(examples, CHUNK)):
        yield chunk


def count_rows(path: Path) -> int:
    """The number of rows, 0 for a file that is not there. Raises DataError for one that cannot be read."""
    return _metadata(path).num_rows if path.is_file() else 0


def learned_turns(example: Example, train_on: Literal["last", "all"]) -> Iterator[Example]:
    """The example; before it, where all assistant turns are learned, one for each that its history has."""
    turns = example.history if train_on == "all" else ()
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            before = {"history": turns[: number - 1], "question": turns[number - 1].content}
            yield example.model_copy(update={**before, "completion": turn.content})
    yield example


def _conversations(path: Path) -> Iterator[Example]:
    """Messages may be lists of role and content, or the same as JSON text. A row that says no `problem_id` is its own."""
    names = _metadata(path).schema.to_arrow_schema().names
    known = [name for name in names if name == MESSAGES or name in Example.model_fields]
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK, columns=known):
            for row in batch.to_pylist():
                number += 1
                about = {"problem_id": f"row {number}", "source": path.name, "trace_key": None}
                yield _example({**about, **row}, f"{path}: row {number}")


def _example(row: dict[str, Any], where: str) -> Example:
    try:
        messages = json.loads(row[MESSAGES]) if isinstance(row[MESSAGES], str) else row[MESSAGES]
        return Example.model_validate({**row, MESSAGES: messages})
    except ValidationError as exc:
        fault = exc.errors()[0]
        field = ".".join(map(str, fault["loc"])) or None
        raise DataError(fault["msg"].removeprefix("Value error, "), where=where, field=field) from exc
    except ValueError as exc:
        raise DataError(f"not JSON ({exc})", where=where, field=MESSAGES) from exc


def _metadata(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"not a readable Parquet file of examples ({exc})", where=path) from exc
