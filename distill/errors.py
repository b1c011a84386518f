"""Every error potstill raises on purpose, in one tree.

    PotstillError                     exit code
    ├── UserInputError                2   what the user gave is wrong; nothing was written
    │   ├── RecipeError                   a recipe, a zoo entry or a --set override
    │   ├── DataError                     a prompt file, a trace file, a ledger
    │   └── CheckpointError               a model folder: shards, shapes, values, tokenizer
    ├── EnvironmentFault              3   disk, network, memory, GPU, a missing program or package
    ├── TrainingFailure               4   a loss that is not finite, a run that cannot go on
    └── Preempted                     75  stopped from outside; the same command resumes

A message is one line: where (file, then field), what is wrong, what was got, what is allowed.
The command line prints that line and exits with the class's code; a traceback means a defect of ours. What was got may
be megabytes: a longer line is cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike
from typing import ClassVar

MAX_CHARACTERS = 2_000


class PotstillError(Exception):
    """Base of the tree. `where` is a file or a service, `field` the place inside it."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | PathLike[str] | None = None,
        field: str | None = None,
    ) -> None:
        self.where = None if where is None else str(where)
        self.field = field
        parts = [part for part in (self.where, self.field) if part]
        line = " ".join(": ".join([*parts, message[:MAX_CHARACTERS]]).split())
        super().__init__(line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 3]}...")


class UserInputError(PotstillError):
    exit_code = 2


class RecipeError(UserInputError):
    pass


class DataError(UserInputError):
    pass


class CheckpointError(UserInputError):
    pass


class EnvironmentFault(PotstillError):
    exit_code = 3


class TrainingFailure(PotstillError):
    exit_code = 4


class Preempted(PotstillError):
    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known word, else the list of what is allowed."""
    names = sorted(known)
    match = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {match[0]!r}?" if match else f"allowed: {', '.join(names)}"
