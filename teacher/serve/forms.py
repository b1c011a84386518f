"""How an answer is written down: whole or in pieces, as a chat message or as text, with logprobs and token ids.

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
from teacher.serve.batching import Written
from teacher.serve.messages import ChatRequest, CompletionRequest, Request

Spell = Callable[..., str]
RequestType = TypeVar("RequestType", bound=Request)
UNSPELLABLE = "\ufffd"
MAX_CHARACTER_BYTES = 4  # UTF-8


class Form(ABC, Generic[RequestType]):
    """The two endpoints differ in the shape of a choice. `spell` says the text of tokens, where the teacher can."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: RequestType, spell: Spell | None) -> None:
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._spell = spell

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = self.chunk_object if chunk else self.whole_object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def whole(self, answers: Sequence[Written]) -> dict[str, Any]:
        choices = [self.choice(index, *self._content(one)) | self._ids(one) for index, one in enumerate(answers)]
        return {**self.head(chunk=False), "choices": choices, "usage": usage(answers, n=self.request.n)}

    def chunks(self, index: int, answer: Written) -> list[dict[str, Any]]:
        first, *rest = self.deltas(index, *self._content(answer))
        return [{**self.head(chunk=True), "choices": [choice]} for choice in (first | self._ids(answer), *rest)]

    def _content(self, answer: Written) -> tuple[str, str, dict[str, Any] | None]:
        """Text, finish reason and logprobs of a choice."""
        completion = answer.completion
        text, stopped = self.request.cut(completion.text)
        scores = None
        if self.request.num_logprobs() is not None and completion.logprobs is not None:
            scores = self.logprobs(TokenLogprobs.unpacked(completion.logprobs), len(answer.opening))
        return text, "stop" if stopped else completion.finish_reason, scores

    def _ids(self, answer: Written) -> dict[str, Any]:
        if not self.request.return_token_ids:
            return {}
        return {"prompt_token_ids": list(answer.prompt_ids), "token_ids": list(answer.token_ids)}

    def _named(self, token: int | str) -> str:
        if isinstance(token, str):
            return token
        if self._spell is None or self.request.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self._spell(token)

    def _top(self, pairs: list[Scored]) -> list[Scored]:
        return pairs[: self.request.num_logprobs() or 0]

    @abstractmethod
    def logprobs(self, kept: TokenLogprobs, start: int) -> dict[str, Any]:
        """`logprobs` of a choice, whose tokens wrote its text from `start` on."""

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """One entry of `choices` in an answer that comes whole."""

    @abstractmethod
    def deltas(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
    ) -> list[dict[str, Any]]:
        """The entries of `choices` that a stream sends for it, one chunk each."""


class TextForm(Form[CompletionRequest]):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def logprobs(self, kept: TokenLogprobs, start: int) -> dict[str, Any]:
        tokens = [token for token, _ in kept.sampled]
        return {
            "tokens": [self._named(token) for token in tokens],
            "token_logprobs": [logprob for _, logprob in kept.sampled],
            "top_logprobs": [{self._named(token): value for token, value in self._top(top)} for top in kept.top],
            "text_offset": self._offsets(tokens, start),
        }

    def _offsets(self, tokens: Sequence[int | str], start: int) -> list[int]:
        """Where in the text each token begins; one that goes on with another's character begins where that does."""
        offsets: list[int] = []
        pending: list[int] = []  # tokens whose last bytes are no character yet
        whole = 0  # how much of their text is
        for token in tokens:
            if isinstance(token, str) or self._spell is None:
                offsets.append(start)
                start += len(self._named(token))
                continue
            if pending and not self._spell(token).startswith(UNSPELLABLE):  # then it ends none of them
                start, whole, pending = start + len(self._spell(*pending)), 0, []
            offsets.append(start + whole)
            pending.append(token)
            text = self._spell(*pending)
            if text.endswith(UNSPELLABLE) and len(pending) < MAX_CHARACTER_BYTES:
                whole = len(text.rstrip(UNSPELLABLE))
            else:
                start, whole, pending = start + len(text), 0, []
        return offsets

    def choice(self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def deltas(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
    ) -> list[dict[str, Any]]:
        return [self.choice(index, text, finish_reason, logprobs)]


class ChatForm(Form[ChatRequest]):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def logprobs(self, kept: TokenLogprobs, start: int) -> dict[str, Any]:
        entries = zip(kept.sampled, kept.top, strict=True)
        return {
            "content": [
                {**self._entry(pair), "top_logprobs": [self._entry(other) for other in self._top(top)]}
                for pair, top in entries
            ]
        }

    def _entry(self, pair: Scored) -> dict[str, Any]:
        name = self._named(pair[0])
        return {"token": name, "logprob": pair[1], "bytes": None if UNSPELLABLE in name else list(name.encode())}

    def choice(self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def deltas(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
    ) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": text}
        return [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None},
            {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason},
        ]


def usage(answers: Sequence[Written], *, n: int) -> dict[str, int]:
    """Token counts; the prompt of `n` samples counts once."""
    prompt = sum(answer.completion.num_prompt_tokens for answer in answers[::n])
    written = sum(answer.completion.num_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
