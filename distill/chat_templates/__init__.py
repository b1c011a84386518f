"""Chat templates of others, rendered where they can do no harm.

A template is a program: it may loop, recurse or write without end, on every conversation or on one. So none is rendered
in this process. A child, started by the first rendering and kept, renders them all (`room`, `worker`); the kernel
bounds its processor time and its memory, and what it writes is counted while it is written. A rendering costs a round
trip over a pipe; `render_all` makes one of many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from distill.chat_templates.room import Room, TemplateRefusal
from distill.errors import DataError

__all__ = ["TemplateOwner", "TemplateRefusal", "render", "render_all"]

Conversation = Sequence[Mapping[str, Any]]

BATCH_CHARACTERS = 8 << 20  # of conversations in one round trip, about
BATCH_CONVERSATIONS = 256


class TemplateOwner(Protocol):
    """What has a chat template and names special tokens: any tokenizer of transformers."""

    name_or_path: str

    @property
    def special_tokens_map(self) -> Mapping[str, str]: ...

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template's text; with `tools`, where there are several, the one that is for them."""


def render(
    owner: TemplateOwner,
    messages: Conversation,
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation: what `apply_chat_template(tokenize=False)` of the owner gives.

    `variables` are the template's own (`enable_thinking`). All is plain JSON. Raises TemplateRefusal in the template's
    words where it takes no such conversation, CheckpointError for a template that is broken or goes over a limit.
    """
    (text,) = render_all(owner, [messages], tools=tools, add_generation_prompt=add_generation_prompt, **variables)
    return text


def render_all(
    owner: TemplateOwner,
    conversations: Iterable[Conversation],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[str]:
    """The texts of many conversations, as `render` gives them; the first fault ends it."""
    source = owner.get_chat_template(tools=tools)
    known = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    settings = _json({**{name: str(token) for name, token in owner.special_tokens_map.items()}, **known, **variables})
    room = _room(os.getpid())
    where = f"{owner.name_or_path}: chat template"
    return [text for batch in _batches(conversations) for text in room.render(source, settings, batch, where=where)]


@cache
def _room(_pid: int) -> Room:
    """This process's own: a fork has its parent's pipes, but must not speak into them."""
    return Room()


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for conversation in conversations:
        batch.append(_json(list(conversation)))
        size += len(batch[-1])
        if len(batch) == BATCH_CONVERSATIONS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"is not plain JSON ({exc})", where="chat template", field="messages") from exc
