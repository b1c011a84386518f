"""The seams where stages meet. Rooms that may not import one another implement and use these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from distill.records import (
    Completion,
    FinishReason,
    Problem,
    Sampling,
    TeacherIdentity,
    TraceRequest,
    Verdict,
)


@runtime_checkable
class Teacher(Protocol):
    """Writes completions. Deterministic for one identity, sampling and request wherever the backend can be."""

    @property
    def identity(self) -> TeacherIdentity: ...

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion a request, each as soon as it is finished, in any order."""
        ...

    def close(self) -> None:
        """Free what the teacher holds: memory, connections, a server it started."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A teacher that can say at any moment, from any thread, how its work stands (requests in flight, cost so far)."""

    def facts(self) -> dict[str, str | float]: ...


class ScoredText(NamedTuple):
    """Tokens whose log-likelihood is wanted, and those before them, at least one; all of them fit into the model."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


class Likelihood(NamedTuple):
    """The sum of a continuation's log-probabilities, in nats, and whether each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


class PlainPrompt(NamedTuple):
    """Tokens to go on from as they are, no chat template around them.

    `stop` are texts at whose first occurrence the answer ends; `shaping` are fields of OpenAI's or vLLM's API that
    shape the distribution beyond `sampling` (`top_k`, `min_p`, `repetition_penalty`, ...). `seed` is the sample's own.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    shaping: tuple[tuple[str, float], ...] = ()


class PlainAnswer(NamedTuple):
    """What was written behind a `PlainPrompt`, without special tokens; from a stop text on it may be cut or not."""

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int


class Vocabulary(Protocol):
    """A model's tokenizer and chat template."""

    @property
    def prefix_id(self) -> int:
        """What stands before a text that nothing stands before: the token for its beginning, else for its end."""
        ...

    @property
    def end_text(self) -> str:
        """The text of the token that ends a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def spell(self, *token_ids: int) -> str: ...

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt it ends within the last turn, to be continued.

        Raises UserInputError where there is no chat template, or none that takes these."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """A model that is asked by its tokens: it scores any text, and goes on from any."""

    @property
    def identity(self) -> TeacherIdentity: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def num_positions(self) -> int:
        """Tokens that the model can read; one more may be scored behind them."""
        ...

    def likelihoods(self, wanted: Sequence[ScoredText]) -> Iterator[tuple[int, Likelihood]]:
        """Yield each text's number and its log-likelihood, as soon as it is known, in any order."""
        ...

    def continuations(self, wanted: Sequence[PlainPrompt]) -> Iterator[tuple[int, PlainAnswer]]:
        """Yield each prompt's number and its answer, as soon as it is finished, in any order."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Grades answers. Used by training filters, rewards and evaluation alike."""

    def verify(self, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        """Yield one verdict an answer, in order. Never raises for what a model wrote."""
        ...

    def close(self) -> None: ...
