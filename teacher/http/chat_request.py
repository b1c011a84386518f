"""The request of `/v1/chat/completions`: a conversation, and how its answer is told.

With `continue_final_message`, as in vLLM, the answer goes on from the assistant message that ends the conversation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from distill.reasoning import END_OF_THINKING
from teacher.http.request import MAX_LOGPROBS, Request, sample_of
from teacher.live import GenerationRequest


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if not self.text:
            raise ValueError("content: must not be empty")
        return self


class ChatRequest(Request):
    """`/v1/chat/completions`. A teacher answers one question: one user message, no system message; behind it, with
    `continue_final_message`, what the assistant has written so far."""

    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    messages: list[Message] = Field(min_length=1, max_length=2)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include_reasoning: bool | None = None

    @field_validator("messages")
    @classmethod
    def _one_question_and_what_is_written(cls, messages: list[Message], info: ValidationInfo) -> list[Message]:
        continued = bool(info.data.get("continue_final_message"))
        wanted = ["user", "assistant"] if continued else ["user"]
        if [message.role for message in messages] != wanted:
            allowed = "a user message, then the assistant message to continue" if continued else "one user message"
            raise ValueError(f"must be {allowed}, got {', '.join(message.role for message in messages)}")
        return messages

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continue_final_message:
            raise ValueError("add_generation_prompt: must be the opposite of continue_final_message")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.continue_final_message and self.thinking_token_budget is not None:
            raise ValueError("thinking_token_budget: cannot be counted in a message that goes on")
        if self.continue_final_message and self.grammar() is not None:
            raise ValueError(f"{self.grammar().field}: cannot be kept by a message that goes on")
        return self

    def prompts(self) -> list[GenerationRequest]:
        partial_answer = self.messages[1].text if self.continue_final_message else ""
        return [GenerationRequest(sample_of(self.messages[0].text), partial_answer)]

    @property
    def has_thought(self) -> bool:
        """True where the answer goes on behind its reasoning."""
        return self.continue_final_message and END_OF_THINKING in self.messages[1].text

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
