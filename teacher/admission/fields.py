"""What every JSON object of the API is read by, and the fields that cannot change an answer.

A field that is null is as one that is not there. A field that is not known is refused, and so is one that would change
the answer and is not honoured; what follows are those that say how the service around a model works.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _no_flag(given: Any) -> Any:
    """Python's true is the number 1; JSON's is none."""
    if isinstance(given, bool):
        raise ValueError("expected a number, but got a boolean instead")
    return given


Integer = Annotated[int, BeforeValidator(_no_flag)]
Number = Annotated[float, BeforeValidator(_no_flag)]
# The tags of a union stand in brackets: they are no part of a field's name.
LIST, SINGLE = "(list)", "(single)"


def _list_or_single(given: Any) -> str:
    return LIST if isinstance(given, list) else SINGLE


def one_or_list(single: Any, several: Any) -> Any:
    """The type of a field that is either; what is wrong with it is told of the one that was meant."""
    return Annotated[Annotated[single, Tag(SINGLE)] | Annotated[several, Tag(LIST)], Discriminator(_list_or_single)]


class ServiceFields(Body):
    """Fields of OpenAI's that say whom to bill, what to store, which computers to use: taken, and not read."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class ChatServiceFields(ServiceFields):
    """Those of chat completions, and fields of which one value alone changes nothing.

    `prediction` is a guess at the answer that may make it come sooner.
    """

    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    audio: None = None
    moderation: None = None
    reasoning_effort: None = None
    web_search_options: None = None
