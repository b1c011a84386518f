"""One request on its way through the engine."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Hashable, Sequence as Tokens
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from teacher.engine.placeholders import placeholder
from teacher.engine.sampler import SamplingParams
from teacher.engine.stopping import RepetitionLimit, Watch
from teacher.engine.token_counts import TokenCounts

if TYPE_CHECKING:
    from teacher.engine.guide import Grammar, Guide

Key = TypeVar("Key", bound=Hashable)
# Random numbers are drawn so many at a time.
_DRAWN_TOGETHER = 64
# One token's: its own, and the likeliest ones with theirs.
Logprobs = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True)
class ThinkingLimit:
    """Budget forcing (s1, arXiv 2501.19393 s.3.1): after `max_tokens` without `end_token`, `forced_ids` are written."""

    max_tokens: int
    end_token: int
    forced_ids: tuple[int, ...]


@dataclass(eq=False)
class Sequence(Generic[Key]):
    """Prompt, what was generated so far, and the sequence's own source of randomness.

    `seed` alone decides the random numbers, so a request draws the same tokens whatever else is in the batch (up to
    rounding in the logits). `key` is the caller's. `thinking` is the limit that still holds; None: none, or past it.
    `fault` says why a sequence ended without an answer. `first_ids` are written first, whatever is sampled.
    """

    key: Key
    prompt_ids: Tokens[int]
    max_tokens: int
    seed: int
    sampling_params: SamplingParams = SamplingParams()  # noqa: RUF009 - frozen
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "repetition"] | None = None
    fault: str | None = None
    thinking: ThinkingLimit | None = None
    # Texts that end it (in the tokens that it writes, not in its prompt), and how long it may loop; None: as it likes.
    stops: tuple[str, ...] = ()
    repetition: RepetitionLimit | None = None
    grammar: Grammar | None = None  # for who makes the guide where the engine is
    guide: Guide | None = None
    streamed: bool = False  # whether each step's tokens are told, not only the last
    logprobs: list[Logprobs] = field(default_factory=list)  # one entry a generated token, where they are wanted
    # One a token of the prompt behind its place `scored_from`, likewise.
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    scored_from: int = 0
    first_ids: Tokens[int] = ()
    watch: Watch | None = None  # the engine's, for stops and repetition
    counts: TokenCounts | None = None  # the engine's, for penalties
    # The engine's: pages of the cache in order, how many tokens have their latents there, the keys of full pages, that
    # of the last one where it is not full, by the number of tokens, and the prompt's, for who waits to be told of it.
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    last_key: tuple[int, bytes] = 0, b""
    tail_key: bytes | None = None
    # A guess at the next token, and how many were made and how many of them came true.
    draft: int | None = None
    num_drafts: int = 0
    num_accepted: int = 0
    # Tokens that a step under way samples (`run_ahead`), at the end of `generated_ids`.
    num_placeholders: int = 0
    is_wanted: bool = True
    seat: int = -1  # its row in the host's tables of decoding sequences (`graph_inputs`)
    _forced: deque[int] = field(default_factory=deque)
    _random: random.Random | None = None
    _uniforms: array[float] = field(default_factory=lambda: array("d"))  # of all generated tokens, and some to come

    def __post_init__(self) -> None:
        self._forced.extend(self.first_ids)

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) that decides the next token, or the one `ahead` tokens later."""
        return self.uniform_of(self.num_written + ahead)

    def uniform_of(self, number: int) -> float:
        """The number in [0, 1) that decides the generated token with this number, from zero.

        Python's generator is the same in every version.
        """
        if number >= len(self._uniforms):
            if self._random is None:
                self._random = random.Random(self.seed)
            while number >= len(self._uniforms):
                self._uniforms.extend([self._random.random() for _ in range(_DRAWN_TOGETHER)])
        return self._uniforms[number]

    @staticmethod
    def uniforms_of(sequences: list[Sequence[Any]], ahead: int) -> list[float]:
        """The numbers that decide each one's first token behind those that it has or expects, or one `ahead` of it."""
        numbers = []
        for sequence in sequences:
            drawn, number = sequence._uniforms, len(sequence.generated_ids) + ahead
            numbers.append(drawn[number] if number < len(drawn) else sequence.uniform_of(number))
        return numbers

    @property
    def forced(self) -> int | None:
        """The next token, whatever is sampled; None: the sampled one."""
        return self._forced[0] if self._forced else None

    def append(self, sampled: int, eos_token_ids: frozenset[int]) -> int:
        """Take a sampled token, or the next forced one in its place, and return it.

        An end token is kept in `generated_ids` and ends the sequence.
        """
        token = self._forced.popleft() if self._forced else sampled
        num_generated = len(self.generated_ids) - self.num_placeholders + 1
        if self.num_placeholders:
            self.generated_ids[num_generated - 1] = token
            self.num_placeholders -= 1
        else:
            self.generated_ids.append(token)
        if self.counts is not None:
            self.counts.push(token)
        if self.guide is not None:
            self.guide.push(token)
            self.fault = self.guide.fault
        seen = None if self.watch is None else self.watch.ends_with(token)
        if token in eos_token_ids or self.fault is not None:
            self.finish_reason = "stop"
        elif seen is not None:
            self.finish_reason = seen
        elif num_generated >= self.max_tokens:
            self.finish_reason = "length"
        elif self.thinking is not None:
            if num_generated >= self.thinking.max_tokens and token != self.thinking.end_token:
                self._forced.extend(self.thinking.forced_ids)
            if self._forced or token == self.thinking.end_token:
                self.thinking = None
        if self.finish_reason is not None:
            del self.generated_ids[num_generated:]
            self.num_placeholders = 0
        return token

    def append_placeholder(self, row: int) -> None:
        """Stand in for the next token, which the step under way samples as its `row`th; `append` says which it is."""
        self.generated_ids.append(placeholder(row))
        self.num_placeholders += 1

    @property
    def num_written(self) -> int:
        """Generated tokens that are known: no placeholders."""
        return len(self.generated_ids) - self.num_placeholders

    @property
    def may_run_ahead(self) -> bool:
        """Tell whether the step after the next token can begin before it is known here."""
        depends = self.thinking is not None or self._forced or self.counts is not None or self.guide is not None
        return not (depends or self.sampling_params.top_logprobs)

    @cached_property
    def is_plain(self) -> bool:
        """Tell whether a graph can draw its tokens: the logits are not changed before it, and not kept."""
        params = self.sampling_params
        return self.counts is None and self.guide is None and not params.logit_bias and not params.top_logprobs

    @property
    def is_unscored(self) -> bool:
        """Tell whether logprobs of its prompt are wanted and not there yet: its places must be computed for them."""
        return self.sampling_params.prompt_logprobs is not None and self.first_unscored < len(self.prompt_ids) - 1

    @property
    def first_unscored(self) -> int:
        """The first place of the prompt behind which a token stands whose logprob is not known, if any is wanted."""
        return self.scored_from + len(self.prompt_logprobs)

    @property
    def is_ended(self) -> bool:
        """Tell whether nothing more is to be written: it is finished, or was cancelled."""
        return self.finish_reason is not None or not self.is_wanted

    @property
    def is_written(self) -> bool:
        """Tell whether its last token is there, or under way, as far as is known."""
        return len(self.generated_ids) >= self.max_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def num_left(self) -> int:
        """Tokens whose latents are not in the cache: one while decoding, more while the prompt is read."""
        return len(self.prompt_ids) + len(self.generated_ids) - self.num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids from `start` to `end` of prompt and generated text together."""
        length = len(self.prompt_ids)
        if start >= length:
            return self.generated_ids[start - length : end - length]
        return [*self.prompt_ids[start:end], *self.generated_ids[: max(end - length, 0)]]
