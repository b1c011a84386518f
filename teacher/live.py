"""A teacher that takes requests while others are under way: what the HTTP server and such a backend share.

The native backend is one: a request joins the batch that is running, streams its tokens and may be cancelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from distill.errors import PotstillError
from distill.protocols import Teacher
from distill.records import Completion, Sampling, TraceRequest
from teacher.engine.sequence import Grammar, Logprobs
from teacher.engine.stopping import RepetitionLimit

# The stop reason of a text that repeats itself, in vLLM's word.
REPETITION = "repetition_detected"


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


class GenerationRequest(NamedTuple):
    """One sample that is wanted: the answer to a question, or the continuation of a text.

    `partial_answer` is what the answer says already; `prompt_ids`, where there are any, are all that stands before the
    completion, and the question is not read.
    """

    request: TraceRequest
    partial_answer: str = ""
    prompt_ids: tuple[int, ...] = ()
    options: RequestOptions = RequestOptions()

    @property
    def is_continuation(self) -> bool:
        return bool(self.partial_answer or self.prompt_ids)


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

    def gauges(self) -> dict[str, float]:
        """Numbers of its own for `/metrics`, by name."""
        ...

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with none added for its beginning or end."""
        ...

    def spell(self, *token_ids: int) -> str:
        """The text of these tokens alone; U+FFFD for bytes that are no text."""
        ...
