"""The turns of a conversation, as the API has them and as chat templates take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from teacher.admission.documents import DocumentError, loads
from teacher.admission.fields import Body, one_or_list

MAX_MESSAGES = 4_096
MAX_CALLS = 128


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _has_arguments(self) -> FunctionCall:
        self.parsed()
        return self

    def parsed(self) -> dict[str, Any]:
        """The arguments; no text is none. Raises ValueError for what is no object."""
        try:
            value = loads((self.arguments or "{}").encode())
        except DocumentError as exc:
            raise ValueError(f"arguments: must be the text of a JSON object; {exc.message}") from exc
        if not isinstance(value, dict):
            raise ValueError("arguments: must be the text of a JSON object")
        return value


class ToolCall(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn. What an earlier answer of ours was is one too, whatever fields of it are null."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: one_or_list(str, Annotated[list[TextPart], Field(min_length=1)]) | None = None  # type: ignore[valid-type]
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """Its words; parts follow each other line by line, as with vLLM."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise ValueError("content: is required" + (" without tool_calls" if self.role == "assistant" else ""))
        if (self.tool_calls or self.reasoning_content is not None) and self.role != "assistant":
            field = "tool_calls" if self.tool_calls else "reasoning_content"
            raise ValueError(f"{field}: is for messages of the role 'assistant'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            needed = "is required" if self.role == "tool" else "is for messages of the role 'tool'"
            raise ValueError(f"tool_call_id: {needed}")
        return self

    def rendered(self) -> dict[str, Any]:
        """The message as transformers' chat templates have it: arguments are an object there."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        for field in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed()},
                }
                for call in self.tool_calls
            ]
        return message


def check_order(messages: Iterable[Message]) -> None:
    """Raise ValueError for a tool's message that answers no call of the assistant's last message."""
    called: set[str] = set()
    for place, message in enumerate(messages):
        if message.role != "tool":
            called = {call.id for call in message.tool_calls or ()}
        elif message.tool_call_id not in called:
            text = "messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
            raise ValueError(f"messages[{place}].tool_call_id: {text}, got {message.tool_call_id!r}")
