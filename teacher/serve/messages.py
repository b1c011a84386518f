"""What the HTTP API reads and writes: OpenAI's completions and chat completions, as far as a Teacher can honour them.

A field that would change the answer and is not honoured is refused with 400, never ignored: log-probabilities, tools,
penalties, token ids as prompts, more than one user message. `stop` is applied to the finished text.
`thinking_token_budget` is budget forcing, under vLLM's name for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.records import Completion, Problem, Sampling, TraceRequest

StopStrings = str | Annotated[list[str], Field(max_length=16)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Request(BaseModel, ABC):
    """The fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: StopStrings = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    user: str | None = None
    thinking_token_budget: int | None = Field(None, ge=1)

    @abstractmethod
    def prompts(self) -> list[str]:
        """The questions; each is answered `n` times."""

    def limit(self) -> int | None:
        return self.max_tokens

    def sampling(self, default: Sampling) -> Sampling:
        """`default` with what the request says otherwise."""
        said = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.limit(),
            "seed": self.seed,
            "max_thinking_tokens": self.thinking_token_budget,
        }
        return default.model_copy(update={name: value for name, value in said.items() if value is not None})

    def trace_requests(self, first_index: int) -> list[TraceRequest]:
        """`n` requests a prompt. A seeded request starts at index 0, so that it can be repeated; one without a seed
        gets indices of its own, so that it differs from every other and still shares their batch."""
        start = 0 if self.seed is not None else first_index
        problems = [Problem(prompt=text, answer=None, grader="math", source="http") for text in self.prompts()]
        return [
            TraceRequest(problem=problem, sample_index=start + index)
            for number, problem in enumerate(problems)
            for index in range(number * self.n, (number + 1) * self.n)
        ]

    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first stop string, and whether there was one."""
        ends = [place for place in (text.find(stop) for stop in self.stops()) if place >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


class CompletionRequest(Request):
    """`/v1/completions`. Each prompt is a question: the teacher's own chat template is put around it."""

    prompt: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    )
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    logprobs: Literal[None] = None

    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user"]
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
    """`/v1/chat/completions`. A teacher answers one question: exactly one user message, no system message."""

    messages: list[Message] = Field(min_length=1, max_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None

    def prompts(self) -> list[str]:
        return [self.messages[0].text]

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def usage(completions: list[Completion], *, n: int) -> dict[str, int]:
    """Token counts; the prompt of `n` samples counts once."""
    prompt = sum(completion.num_prompt_tokens for completion in completions[::n])
    written = sum(completion.num_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
