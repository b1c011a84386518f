"""The fields that both kinds of request share: OpenAI's, as far as a Teacher can honour them, and vLLM's.

A field that would change the answer and is not honoured is refused with 400, never ignored. Beside OpenAI's fields
there are vLLM's, under its names: `top_k`, `min_p`, `repetition_penalty`, `repetition_detection`, `structured_outputs`,
`stream_interval`, and those that budget forcing and logit distillation use, `thinking_token_budget`, `return_token_ids`
and `return_tokens_as_token_ids`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.records import Problem, Sampling, TraceRequest
from teacher.admission.fields import Body, Integer, Number, ServiceFields, one_or_list
from teacher.engine.stopping import RepetitionLimit
from teacher.http.structured import StructuredFields
from teacher.live import GenerationRequest, RequestOptions

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1_024
# A bias is looked up for every token that is drawn.
MAX_BIASES = 1_024
MAX_PATTERN = 512
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = one_or_list(StopString, Annotated[list[StopString], Field(max_length=MAX_STOPS)])
Bias = Annotated[Number, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]
# OpenAI's bounds; vLLM has none for the third, and 1 is none.
Penalty = Annotated[Number, Field(ge=-2, le=2)] | None
RepetitionPenalty = Annotated[Number, Field(gt=0, le=10)] | None
MAX_SEED = 2**63 - 1


class StreamOptions(Body):
    """`include_obfuscation` is for networks that others listen to; the length of our pieces is not hidden."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class RepetitionDetection(Body):
    """vLLM's, and `min_tokens`: how many tokens the repeated stretch has at least (there it is none)."""

    max_pattern_size: Integer = Field(0, ge=0, le=MAX_PATTERN, description="0: off")
    min_pattern_size: Integer = Field(0, ge=0, le=MAX_PATTERN, description="0: as 1")
    min_count: Integer = Field(0, ge=0)
    min_tokens: Integer = Field(0, ge=0)

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


class Request(ServiceFields, StructuredFields, ABC):
    """The fields that both kinds of request share."""

    model: str
    n: Integer = Field(1, ge=1, le=128)
    temperature: Number | None = Field(None, ge=0, le=5)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, description="0 and -1: all")
    min_p: Number | None = Field(None, ge=0, le=1)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=MAX_BIASES)
    repetition_detection: RepetitionDetection | None = None
    max_tokens: Integer | None = Field(None, ge=1)
    seed: Integer | None = Field(None, ge=0, le=MAX_SEED)
    stop: StopStrings | None = None  # type: ignore[valid-type]
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Integer = Field(1, ge=1, description="tokens that a piece of a stream has at least")
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: RepetitionPenalty = None
    thinking_token_budget: Integer | None = Field(None, ge=1)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @abstractmethod
    def prompts(self) -> list[GenerationRequest]:
        """The prompts, each as its sample 0; each is answered `n` times."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens told at every position; None: no logprobs at all."""

    def num_prompt_logprobs(self) -> int | None:
        """The number of likeliest tokens told at every position of the prompt; None: no logprobs of it at all."""
        return None

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
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            prompt_logprobs=self.num_prompt_logprobs(),
            repetition_detection=repetition if detection is None else detection.limit(),
            grammar=self.grammar(),
        )

    def generation_requests(self, first_index: int, options: RequestOptions) -> list[GenerationRequest]:
        """`n` samples a prompt. A seeded request starts at index 0, so that it can be repeated; one without a seed
        gets indices of its own, so that it differs from every other and still shares their batch. The first of a
        prompt's samples scores the prompt, where that is wanted."""
        start, others = 0 if self.seed is not None else first_index, replace(options, prompt_logprobs=None)
        return [
            one._replace(
                request=TraceRequest(problem=one.request.problem, sample_index=start + index),
                options=others if index % self.n else options,
            )
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

    @model_validator(mode="after")
    def _only_a_stream_has_options(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: is only allowed when 'stream' is enabled")
        return self


def sample_of(text: str) -> TraceRequest:
    """Sample 0 of the question `text`, or of what it stands for: its seed must be no other prompt's."""
    return TraceRequest(problem=Problem(prompt=text, answer=None, grader="math", source="http"), sample_index=0)
