"""Conversations as a model's chat template renders them: nothing that was said is dropped on the way.

Templates differ in what they take: some have no system message, no tools, only turns that alternate, and most leave out
what they do not know without a word. So before a conversation of a new shape is rendered, one of that shape is whose
every turn is a marker, and all of them must show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distill.errors import UserInputError
from teacher.backends.tokenizer import render
from teacher.live import CallFormat, Conversation

# Shapes whose verdict is remembered: those of one chat client are as many as its longest conversation has turns.
MAX_SHAPES = 1_024
OFFERED = {
    "type": "function",
    "function": {
        "name": "potstill-offered",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}


class _Turn(NamedTuple):
    """All of a message that a template may decide by, but its words."""

    role: str
    has_content: bool
    num_calls: int
    fields: tuple[str, ...]


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._takes_objects = lru_cache(MAX_SHAPES)(self._judged)

    def render(self, conversation: Conversation) -> str:
        """The text of the prompt, up to where the answer begins.

        Developer messages are system messages where the template does not know the role. Raises UserInputError for what
        the template has no place for or refuses.
        """
        messages = [self._as_known(message) for message in conversation.messages]
        takes_objects = self._takes_objects(tuple(map(_turn, messages)), bool(conversation.tools))
        if not takes_objects:
            messages = [_with_text_arguments(message) for message in messages]
        return render(self._tokenizer, messages, tools=list(conversation.tools) or None)

    @cached_property
    def call_format(self) -> CallFormat | None:
        """The way in which it writes a call of a tool, found by rendering one; None where it has none that is known."""
        name = "potstill-called"
        call = {"id": "call12345", "type": "function", "function": {"name": name, "arguments": {"x": "y"}}}
        asked = {"role": "user", "content": "?"}
        messages = [asked, {"role": "assistant", "content": None, "tool_calls": [call]}, asked]
        for turns in messages, messages[:2]:  # some templates end with the user, others without
            try:
                text = render(self._tokenizer, turns, tools=[OFFERED], add_generation_prompt=False)
            except UserInputError:
                continue
            for start, value in _objects(text):
                if value.get("name") == name and value.get("arguments") == {"x": "y"}:
                    return "hermes" if text[:start].rstrip().endswith("<tool_call>") else None
                if value.get("name") == name and value.get("parameters") == {"x": "y"}:
                    return "llama3_json"
        return None

    def _as_known(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] == "developer" and "developer" not in str(self._tokenizer.chat_template):
            return {**message, "role": "system"}
        return dict(message)

    def _judged(self, shape: tuple[_Turn, ...], has_tools: bool) -> bool:
        """Whether a call's arguments are to be an object, and no text, in a conversation of this shape.

        Raises UserInputError where it has no place for all that is said.
        """
        marked = [_marked(turn, place) for place, turn in enumerate(shape)]
        tools = [OFFERED] if has_tools else None
        try:
            return self._check_all_shows(marked, tools)
        except UserInputError:
            if not any(turn.num_calls for turn in shape):
                raise
        return not self._check_all_shows([_with_text_arguments(message) for message in marked], tools)

    def _check_all_shows(self, marked: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        text = render(self._tokenizer, marked, tools=tools)
        if tools and OFFERED["function"]["name"] not in text:  # type: ignore[index]
            raise UserInputError("the chat template of this model has no tools", field="tools")
        for place, message in enumerate(marked):
            calls = message.get("tool_calls", ())
            if any(call["function"]["name"] not in text for call in calls):
                problem, field = "tool calls", f"messages[{place}].tool_calls"
            elif message["content"] is not None and message["content"] not in text:
                problem, field = f"a message of the role {message['role']!r} here", f"messages[{place}].role"
            else:
                continue
            raise UserInputError(f"the chat template of this model has no place for {problem}", field=field)
        return True


def _turn(message: Mapping[str, Any]) -> _Turn:
    others = sorted(message.keys() - {"role", "content", "tool_calls"})
    return _Turn(message["role"], message["content"] is not None, len(message.get("tool_calls", ())), tuple(others))


def _marked(turn: _Turn, place: int) -> dict[str, Any]:
    message: dict[str, Any] = dict.fromkeys(turn.fields, "potstill12")
    message |= {"role": turn.role, "content": f"potstill-{place}-said" if turn.has_content else None}
    if turn.num_calls:
        functions = (
            {"name": f"potstill-{place}-{call}-called", "arguments": {"x": "y"}} for call in range(turn.num_calls)
        )
        message["tool_calls"] = [{"id": "call12345", "type": "function", "function": one} for one in functions]
    return message


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """As the API itself has them, and DeepSeek's templates."""
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects in a text, and where each begins."""
    decoder = json.JSONDecoder()
    for start, character in enumerate(text):
        if character == "{":
            try:
                value, _ = decoder.raw_decode(text, start)
            except ValueError:
                continue
            yield start, value
