"""The requests of the HTTP API: OpenAI's completions and chat completions, as far as a Teacher can honour them.

A field that would change the answer and is not honoured is refused with 400, never ignored: tools, penalties, system
messages, more than one question. Beside OpenAI's fields there are vLLM's, under its names: `top_k`, `min_p`,
`repetition_detection`, `include_reasoning`, `stream_interval`; those that budget forcing and logit distillation use,
`thinking_token_budget`, `return_token_ids`, `return_tokens_as_token_ids` and prompts of token ids; and
`continue_final_message`, with which the answer goes on from the assistant message that ends the conversation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from distill.reasoning import END_OF_THINKING
from distill.records import Problem, Sampling, TraceRequest, content_id
from teacher.engine.stopping import RepetitionLimit
from teacher.live import GenerationRequest, RequestOptions

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1_024
# A bias is looked up for every token that is drawn.
MAX_BIASES = 1_024
MAX_PATTERN = 512
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]
Zero = Annotated[float, Field(ge=0, le=0)] | None
MAX_PROMPTS, MAX_PROMPT_TOKENS = 1_024, 2**18


def _prompt(given: Any) -> Any:
    """A text, tokens, or a list of either. By hand: pydantic's union tries every form on every entry of a long list."""
    many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = given if many else [given]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    if any(len(one) > MAX_PROMPT_TOKENS for one in prompts if isinstance(one, list)):
        raise ValueError(f"must have at most {MAX_PROMPT_TOKENS} tokens")
    if not all(_is_text(one) for one in prompts) and not all(_is_tokens(one) for one in prompts):
        raise ValueError("must be a text, a list of token ids, or a list of several of the one or the other")
    return given


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int and token >= 0 for token in prompt)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class RepetitionDetection(BaseModel):
    """vLLM's, and `min_tokens`: how many tokens the repeated stretch has at least (there it is none)."""

    model_config = ConfigDict(extra="forbid")

    max_pattern_size: int = Field(0, ge=0, le=MAX_PATTERN, description="0: off")
    min_pattern_size: int = Field(0, ge=0, le=MAX_PATTERN, description="0: as 1")
    min_count: int = Field(0, ge=0)
    min_tokens: int = Field(0, ge=0)

    def limit(self) -> RepetitionLimit | None:
        if not self.max_pattern_size:
            return None
        smallest = max(1, self.min_pattern_size)
        return RepetitionLimit(self.max_pattern_size, smallest, self.min_count, self.min_tokens)

    @model_validator(mode="after")
    def _sizes_agree(self) -> RepetitionDetection:
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError("min_count: must be at least 2")
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError("min_pattern_size: must be at most max_pattern_size")
        return self


class Request(BaseModel, ABC):
    """The fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=MAX_BIASES)
    repetition_detection: RepetitionDetection | None = None
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: StopStrings = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int = Field(1, ge=1, description="tokens that a piece of a stream has at least")
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    user: str | None = None
    thinking_token_budget: int | None = Field(None, ge=1)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @abstractmethod
    def prompts(self) -> list[GenerationRequest]:
        """The prompts, each as its sample 0; each is answered `n` times."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens told at every position; None: no logprobs at all."""

    def num_samples(self) -> int:
        """Count the answers that are asked for, without making any of them."""
        return self.n

    def limit(self) -> int | None:
        return self.max_tokens

    def sampling(self, default: Sampling) -> Sampling:
        """`default` with what the request says otherwise."""
        wanted = self.num_logprobs()
        said = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.limit(),
            "seed": self.seed,
            "max_thinking_tokens": self.thinking_token_budget,
            # A token's own logprob is kept only beside at least one of the likeliest.
            "top_logprobs": None if wanted is None else max(1, wanted),
        }
        return default.model_copy(update={name: value for name, value in said.items() if value is not None})

    def options(self, repetition: RepetitionLimit | None) -> RequestOptions:
        """`repetition` is the limit where the request says nothing of one."""
        detection = self.repetition_detection
        return RequestOptions(
            stop=tuple(self.stops()),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            repetition_detection=repetition if detection is None else detection.limit(),
        )

    def generation_requests(self, first_index: int, options: RequestOptions) -> list[GenerationRequest]:
        """`n` samples a prompt. A seeded request starts at index 0, so that it can be repeated; one without a seed
        gets indices of its own, so that it differs from every other and still shares their batch."""
        start = 0 if self.seed is not None else first_index
        return [
            one._replace(request=TraceRequest(problem=one.request.problem, sample_index=start + index), options=options)
            for number, one in enumerate(self.prompts())
            for index in range(number * self.n, (number + 1) * self.n)
        ]

    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @model_validator(mode="after")
    def _stops_leave_the_tokens_whole(self) -> Request:
        if self.stops() and (self.return_token_ids or self.num_logprobs() is not None):
            raise ValueError("stop: cuts the text, not its tokens; it goes with neither logprobs nor return_token_ids")
        return self


class CompletionRequest(Request):
    """`/v1/completions`. A prompt of text is a question: the teacher's own chat template is put around it. A prompt of
    token ids is taken as it is, and its completion goes on from there."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[GenerationRequest]:
        prompts: list[Any] = [self.prompt] if self._is_single else list(self.prompt)
        return [_question(one) if isinstance(one, str) else _tokens(one) for one in prompts]

    def num_samples(self) -> int:
        return self.n if self._is_single else self.n * len(self.prompt)

    @property
    def _is_single(self) -> bool:
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], int)

    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _a_budget_needs_a_question(self) -> CompletionRequest:
        if self.thinking_token_budget is not None and any(one.prompt_ids for one in self.prompts()):
            raise ValueError("thinking_token_budget: where a prompt of token ids thinks cannot be seen")
        return self


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
        return self

    def prompts(self) -> list[GenerationRequest]:
        partial_answer = self.messages[1].text if self.continue_final_message else ""
        return [_question(self.messages[0].text)._replace(partial_answer=partial_answer)]

    @property
    def has_thought(self) -> bool:
        """True where the answer goes on behind its reasoning."""
        return self.continue_final_message and END_OF_THINKING in self.messages[1].text

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TokenizeRequest(BaseModel):
    """`/tokenize`, as vLLM has it, for text. A chat template, if it is wanted, must be in the text already."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str
    add_special_tokens: Literal[False]


def _question(text: str) -> GenerationRequest:
    return GenerationRequest(_sample(text))


def _tokens(ids: list[int]) -> GenerationRequest:
    """The problem stands for the seed alone, which every prompt must have to itself."""
    return GenerationRequest(_sample(f"tokens {content_id(ids)}"), prompt_ids=tuple(ids))


def _sample(text: str) -> TraceRequest:
    return TraceRequest(problem=Problem(prompt=text, answer=None, grader="math", source="http"), sample_index=0)
