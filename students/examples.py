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
from distill.records import Example, Message
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
    """Messages are lists of role and content, or that as JSON text. A row without a `problem_id` goes by its number."""
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
    messages = row.pop(MESSAGES)
    try:
        *history, question, completion = _turns(json.loads(messages) if isinstance(messages, str) else messages, where)
        texts = {"history": history, "question": question.content, "completion": completion.content}
        return Example.model_validate({**row, **texts})
    except ValidationError as exc:
        raise _fault(exc, where) from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"not JSON ({exc})", where=where, field=MESSAGES) from exc


def _turns(messages: Any, where: str) -> list[Message]:
    """The turns of a conversation: a system turn or none, then user and assistant in turn, the assistant last."""
    if not isinstance(messages, list):
        raise DataError(f"must be a list of turns, got {type(messages).__name__}", where=where, field=MESSAGES)
    turns = []
    for number, message in enumerate(messages):
        given = message
        if isinstance(message, dict):  # tables have a column for every field that any turn has
            given = {name: value for name, value in message.items() if value is not None or name == "content"}
        try:
            turns.append(Message.model_validate(given))
        except ValidationError as exc:
            raise _fault(exc, where, MESSAGES, str(number)) from exc
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        text = f"must be user and assistant in turn, the assistant last, got {', '.join(roles) or 'none'}"
        raise DataError(text, where=where, field=MESSAGES)
    return turns


def _fault(exc: ValidationError, where: str, *above: str) -> DataError:
    first = exc.errors()[0]
    field = ".".join((*above, *map(str, first["loc"])))
    return DataError(first["msg"].removeprefix("Value error, "), where=where, field=field)


def _metadata(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"not a readable Parquet file of examples ({exc})", where=path) from exc
