"""Conversations as a model's chat template renders them: nothing that was said is dropped on the way.

Templates differ in what they take: some have no system message, no tools, only turns that alternate, and most leave out
what they do not know without a word. So before a conversation of a new shape is rendered, one of that shape is whose
every turn is a marker, and all of them must show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distill.errors import UserInputError
from teacher.backends.tokenizer import render
from teacher.live import CallFormat, Conversation

# Shapes whose verdict is remembered: those of one chat client are as many as its longest conversation has turns.
MAX_SHAPES = 1_024
CALL_ID = "call12345"  # as short as Mistral's templates want it
OFFERED: dict[str, Any] = {
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
        self._spelling = lru_cache(MAX_SHAPES)(self._found_spelling)

    def render(self, conversation: Conversation) -> str:
        """The text of the prompt, up to where the answer begins.

        Developer messages are system messages where the template does not know the role. Raises UserInputError for what
        the template has no place for or refuses.
        """
        messages = [self._as_known(message) for message in conversation.messages]
        spelled = self._spelling(tuple(map(_turn, messages)), bool(conversation.tools))
        return render(self._tokenizer, [spelled(message) for message in messages], tools=conversation.tools)

    @cached_property
    def call_format(self) -> CallFormat | None:
        """The way in which it writes a call of a tool, found by rendering one; None where it has none that is known."""
        if not self._tokenizer.chat_template:
            return None
        name = "potstill-called"
        call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": {"x": "y"}}}
        asked = {"role": "user", "content": "?"}
        messages = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, asked]
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

    def _found_spelling(self, shape: tuple[_Turn, ...], has_tools: bool) -> Spelling:
        """The first of `SPELLINGS` in which all shows of a conversation of this shape.

        Raises UserInputError where the template has no place for some of it, in whichever.
        """
        marked = [_marked(turn, place) for place, turn in enumerate(shape)]
        spellings = SPELLINGS if any(turn.num_calls for turn in shape) else SPELLINGS[:1]
        faults = []
        for spelled in spellings:
            try:
                self._check_all_shows([spelled(message) for message in marked], has_tools)
            except UserInputError as exc:
                faults.append(exc)
            else:
                return spelled
        raise faults[0]

    def _check_all_shows(self, marked: Sequence[Mapping[str, Any]], has_tools: bool) -> None:
        text = render(self._tokenizer, marked, tools=[OFFERED] if has_tools else [])
        if has_tools and OFFERED["function"]["name"] not in text:
            raise UserInputError("the chat template of this model has no tools", field="tools")
        for place, message in enumerate(marked):
            if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
                problem, field = "tool calls", f"messages[{place}].tool_calls"
            elif message["content"] and message["content"] not in text:
                problem, field = f"a message of the role {message['role']!r} here", f"messages[{place}].role"
            else:
                continue
            raise UserInputError(f"the chat template of this model has no place for {problem}", field=field)


def _turn(message: Mapping[str, Any]) -> _Turn:
    others = sorted(message.keys() - {"role", "content", "tool_calls"})
    return _Turn(message["role"], bool(message["content"]), len(message.get("tool_calls", ())), tuple(others))


def _marked(turn: _Turn, place: int) -> dict[str, Any]:
    message: dict[str, Any] = dict.fromkeys(turn.fields, CALL_ID)
    message |= {"role": turn.role, "content": f"potstill-{place}-said" if turn.has_content else ""}
    if turn.num_calls:
        names = (f"potstill-{place}-{number}-called" for number in range(turn.num_calls))
        message["tool_calls"] = [
            {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": {"x": "y"}}} for name in names
        ]
    return message


def _as_it_is(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return message


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**call["function"], "arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def _with_null_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "content": None} if "tool_calls" in message and not message["content"] else message


Spelling = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# A message with calls, as different templates expect it: DeepSeek's want arguments as text, as the API has them, and
# some ask whether the content is null, where others cannot print that.
SPELLINGS: tuple[Spelling, ...] = (
    _as_it_is,
    _with_text_arguments,
    _with_null_content,
    lambda message: _with_null_content(_with_text_arguments(message)),
)


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
