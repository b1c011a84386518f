"""A teacher that takes requests while others are under way: what the HTTP server and such a backend share.

The native backend is one: a request joins the batch that is running, streams its tokens and may be cancelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from distill.errors import DataError, PotstillError
from distill.protocols import Teacher
from distill.records import Completion, Sampling, TraceRequest
from teacher.engine.guide import Grammar
from teacher.engine.sequence import Logprobs
from teacher.engine.stopping import RepetitionLimit

# The stop reason of a text that repeats itself, in vLLM's word.
REPETITION = "repetition_detected"
# How a model writes the calls of tools, under the names of vLLM's parsers: as Hermes and Qwen
# (`<tool_call>{"name": ..., "arguments": ...}</tool_call>`), or as Llama 3 (`{"name": ..., "parameters": ...}` alone).
CallFormat = Literal["hermes", "llama3_json"]


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request beyond its `Sampling`, under the names that they have over HTTP.

    `teacher.engine.sampler.SamplingParams` says what those that shape the distribution do.
    """

    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionLimit | None = None
    grammar: Grammar | None = None  # behind the reasoning, where the prompt opens it


@dataclass(frozen=True)
class Conversation:
    """Turns and offered tools, in the form in which chat templates take them: a call's arguments are an object."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A text to go on from as it is; `add_special_tokens`: behind what the tokenizer puts in front of any text."""

    text: str
    add_special_tokens: bool = True


class GenerationRequest(NamedTuple):
    """One sample that is wanted: the answer to a question or in a conversation, or the continuation of a text.

    `prompt` is what is asked, where that is not the question of `request`, whose problem then stands for the sample's
    identity alone; token ids are all that stands before the completion. `partial_answer` is what the answer already
    says.
    """

    request: TraceRequest
    prompt: Conversation | PlainText | tuple[int, ...] | None = None
    partial_answer: str = ""
    options: RequestOptions = RequestOptions()


class GeneratedSample(NamedTuple):
    """A completion and its tokens; the text of a continuation is what was added.

    `opening` is what of the text stands in the prompt: the tokens are the rest. `stop_reason` is the stop string that
    ended it, or `REPETITION`. `num_accepted` of `num_drafts` tokens that a teacher drafted came true.
    `prompt_logprobs`, where they are wanted, are those of each token of the prompt but the first.
    """

    completion: Completion
    prompt_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    opening: str = ""
    stop_reason: str | None = None
    num_drafts: int = 0
    num_accepted: int = 0
    prompt_logprobs: Sequence[Logprobs] = ()


class PromptTooLong(DataError):
    """`num_tokens` of a prompt are more than the `limit` that the model takes; `is_least`: there are more of them."""

    def __init__(self, num_tokens: int, limit: int, *, is_least: bool = False, where: str, field: str) -> None:
        self.limit = limit
        self.num_tokens = f"at least {num_tokens}" if is_least else str(num_tokens)
        super().__init__(f"has {self.num_tokens} tokens; the model takes {limit}", where=where, field=field)


class StreamHandle(NamedTuple):
    """A sample under way at a `LiveTeacher`. `cancel` ends it; the rest is as in `GeneratedSample`."""

    cancel: Callable[[], None]
    prompt_ids: Sequence[int]
    opening: str


OnDone = Callable[[GeneratedSample | PotstillError], None]
OnTokens = Callable[[list[int], list[Logprobs]], None]


class LiveTeacher(Teacher, Protocol):
    """A Teacher that takes requests while others are under way, continues any text and knows its tokens."""

    @property
    def fault(self) -> PotstillError | None:
        """The reason why it takes no more requests, or should be given none; those under way may be finished yet."""
        ...

    def submit(
        self, request: GenerationRequest, sampling: Sampling, on_done: OnDone, on_tokens: OnTokens | None = None
    ) -> StreamHandle:
        """Begin one sample; `on_done` is called once, from any thread, and before it `on_tokens`, if it is given, with
        the tokens of every step. Raises PotstillError for a bad request.

        Where the sample is cancelled, `on_done` hears that it was, and what it holds is freed.
        """
        ...

    @property
    def max_characters(self) -> int | None:
        """The number of characters beyond which no text can be a prompt, whatever its tokens are; None: not known.

        No prompt has more tokens either."""
        ...

    def gauges(self) -> dict[str, float]:
        """Numbers of its own for `/metrics`, by name."""
        ...

    @property
    def call_format(self) -> CallFormat | None:
        """The way in which the model writes calls of tools; None: it has none, or none that can be read."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The text's tokens; on demand with those that the tokenizer puts around any text."""
        ...

    def spell(self, *token_ids: int) -> str:
        """The text of these tokens alone; U+FFFD for bytes that are no text."""
        ...
