"""What the answers of both endpoints have in common: whole or in pieces, with logprobs and token ids.

The shapes are OpenAI's, the token ids vLLM's (`return_token_ids`). Where `return_tokens_as_token_ids` is asked for, a
token is called `token_id:17` instead of by its text, which may stand for several.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from distill.logprobs import Scored, TokenLogprobs
from teacher.engine.detokenizer import UNSPELLABLE
from teacher.engine.sequence import Logprobs
from teacher.engine.stopping import RepetitionLimit
from teacher.http.parts import Parts, Splitter, Undivided
from teacher.http.request import Request
from teacher.live import GeneratedSample, RequestOptions

Spell = Callable[..., str]
RequestType = TypeVar("RequestType", bound=Request)
MAX_CHARACTER_BYTES = 4  # UTF-8
UNFINISHED: dict[str, Any] = {"finish_reason": None}


class Form(ABC, Generic[RequestType]):
    """The two endpoints differ in the shape of a choice. `spell` says the text of tokens.

    An answer is all text where its parts are not told apart.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: RequestType, spell: Spell) -> None:
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.spell = spell

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = self.chunk_object if chunk else self.whole_object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def whole(self, answers: Sequence[GeneratedSample]) -> dict[str, Any]:
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return {**self.head(chunk=False), "choices": choices, "usage": usage(answers, n=self.request.n)}

    def num_values(self, answer: GeneratedSample) -> int:
        """Roughly, how much is to be put together for it: tokens, logprobs, token ids."""
        prompt = len(answer.prompt_ids) if self.request.return_token_ids else 0
        scored_prompt = len(answer.prompt_logprobs) * (2 + (self.request.num_prompt_logprobs() or 0))
        return self.values_per_token * answer.completion.num_tokens + prompt + scored_prompt

    @property
    def values_per_token(self) -> int:
        num_logprobs = self.request.num_logprobs()
        return 1 if num_logprobs is None else 2 + num_logprobs

    def kept(self, answer: GeneratedSample) -> TokenLogprobs | None:
        """Its logprobs, where they were asked for."""
        packed = answer.completion.logprobs
        return None if packed is None or self.request.num_logprobs() is None else TokenLogprobs.unpacked(packed)

    def offsets(self, start: int) -> Offsets:
        """The offsets of tokens whose text begins at `start`."""
        return Offsets(start, self.spell)

    def ids(self, prompt_ids: Sequence[int] | None, token_ids: Sequence[int]) -> dict[str, Any]:
        if not self.request.return_token_ids:
            return {}
        prompt = {} if prompt_ids is None else {"prompt_token_ids": list(prompt_ids)}
        return {**prompt, "token_ids": list(token_ids)}

    def _whole_choice(self, index: int, answer: GeneratedSample) -> dict[str, Any]:
        kept, splitter = self.kept(answer), self.splitter()
        logprobs = None if kept is None else self.logprobs(kept, self.offsets(len(answer.opening)))
        parts = splitter.feed(answer.completion.text).then(splitter.rest())
        return {
            "index": index,
            **self.content(parts),
            "logprobs": logprobs,
            **ending(answer, has_called=bool(parts.calls)),
            **self.ids(answer.prompt_ids, answer.token_ids),
        }

    def _named(self, token: int | str) -> str:
        assert isinstance(token, int)  # a `LiveTeacher` knows its tokens
        return f"token_id:{token}" if self.request.return_tokens_as_token_ids else self.spell(token)

    def _top(self, pairs: list[Scored]) -> list[Scored]:
        return pairs[: self.request.num_logprobs() or 0]

    def options(self, repetition: RepetitionLimit | None) -> RequestOptions:
        """Options of the request's samples; `repetition` is the limit where it says nothing of one."""
        return self.request.options(repetition)

    def splitter(self) -> Splitter:
        """The splitter of the parts of one choice."""
        return Undivided()

    @abstractmethod
    def logprobs(self, kept: TokenLogprobs, offsets: Offsets) -> dict[str, Any]:
        """`logprobs` of a choice, or of the next piece of it."""

    @abstractmethod
    def content(self, parts: Parts) -> dict[str, Any]:
        """The text of a whole choice."""

    @abstractmethod
    def deltas(
        self,
        index: int,
        parts: Parts,
        logprobs: dict[str, Any] | None,
        ids: dict[str, Any],
        *,
        first: bool,
        end: dict[str, Any] | None,
    ) -> list[dict[str, Any]]:
        """The entries of `choices` that a stream sends for a piece, one chunk each; `end`: it is the last, and why."""


class Offsets:
    """The place in its text where each token begins, token by token; one that goes on with another's character begins
    where that does."""

    def __init__(self, start: int, spell: Spell) -> None:
        self._start = start
        self._spell = spell
        self._pending: list[int] = []  # tokens whose last bytes are no character yet
        self._whole = 0  # how much of their text is

    def next(self, token: int | str) -> int:
        assert isinstance(token, int)
        if self._pending and not self._spell(token).startswith(UNSPELLABLE):  # then it ends none of them
            self._settle(self._spell(*self._pending))
        offset = self._start + self._whole
        self._pending.append(token)
        text = self._spell(*self._pending)
        if text.endswith(UNSPELLABLE) and len(self._pending) < MAX_CHARACTER_BYTES:
            self._whole = len(text.rstrip(UNSPELLABLE))
        else:
            self._settle(text)
        return offset

    def _settle(self, text: str) -> None:
        self._start, self._whole, self._pending = self._start + len(text), 0, []


def ending(answer: GeneratedSample, *, has_called: bool) -> dict[str, Any]:
    """The reason why a choice ends."""
    reason: str = answer.completion.finish_reason
    if has_called and reason == "stop":
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": answer.stop_reason}


def scored(token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> TokenLogprobs | None:
    """The logprobs of a piece, with as many digits as those of a whole answer have."""
    if not logprobs:
        return None
    sampled: list[Scored] = [(token, own) for token, (own, _) in zip(token_ids, logprobs, strict=True)]
    top: list[list[Scored]] = [[(token, value) for token, value in pairs] for _, pairs in logprobs]
    return TokenLogprobs.unpacked(TokenLogprobs("id", sampled, top).packed())


def usage(answers: Sequence[GeneratedSample], *, n: int) -> dict[str, int]:
    """Token counts; the prompt of `n` samples counts once."""
    prompt = sum(answer.completion.num_prompt_tokens for answer in answers[::n])
    written = sum(answer.completion.num_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
