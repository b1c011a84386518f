"""The base of every part of a recipe: frozen, without unknown keys, without infinite numbers."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The resolved fields that can change what comes of them, for a fingerprint: all but those with a `Mark`."""
        return self.model_dump(mode="json", exclude=set(marked_fields(type(self))))


def each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values; raises ValueError for one that is given twice."""
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return values


# A list in which nothing stands twice, and something stands.
Distinct = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(each_once)]


# Sequences that an engine has in progress together; auto: by the memory of its GPU, else some tens.
BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"]


class Mark(Enum):
    """Marks of fields that change no text of a model, put where one is declared: `Annotated[int, Mark.SPEED]`."""

    SPEED = "how fast it writes"
    PATIENCE = "how patiently it is asked"
    PLACE = "where it runs and how it is reached"
    PRICE = "at what price"


def marked_fields(config: type[Config]) -> dict[str, Mark]:
    """The fields of `config` that are no part of its identity, with their marks."""
    marks = ((name, mark) for name, field in config.model_fields.items() for mark in field.metadata)
    return {name: mark for name, mark in marks if isinstance(mark, Mark)}
