"""The answer of `/v1/chat/completions`: a message.

Reasoning that is told apart from the answer is `reasoning_content`, as with DeepSeek's own API.
"""

from __future__ import annotations

from typing import Any, Literal

from distill.logprobs import Scored, TokenLogprobs
from teacher.engine.detokenizer import UNSPELLABLE
from teacher.http.chat_request import ChatRequest
from teacher.http.form import Form, Offsets, Spell, ending
from teacher.http.reasoning import Reasoning
from teacher.live import GeneratedSample

# What becomes of the reasoning in a chat message: a part of its content, a field of its own, or nothing.
ReasoningPlace = Literal["content", "apart", "out"]


class ChatForm(Form[ChatRequest]):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, spell: Spell, *, reasoning: ReasoningPlace = "content") -> None:
        """`reasoning` is its place where the request does not say."""
        super().__init__(request, spell)
        said: dict[bool | None, ReasoningPlace] = {None: reasoning, True: "apart", False: "out"}
        self._placing = said[request.include_reasoning]

    def splitter(self) -> Reasoning:
        return Reasoning(has_ended=self._placing == "content" or self.request.has_thought)

    def logprobs(self, kept: TokenLogprobs, offsets: Offsets) -> dict[str, Any]:
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

    def content(self, reasoning: str, text: str) -> dict[str, Any]:
        """A text that ended within the reasoning has no answer: null, as with vLLM."""
        message: dict[str, Any] = {"role": "assistant"}
        if self._placing == "apart":
            message["reasoning_content"] = reasoning or None
        return {"message": {**message, "content": text if self._placing == "content" else text or None}}

    def deltas(
        self,
        index: int,
        parts: tuple[str, str],
        logprobs: dict[str, Any] | None,
        ids: dict[str, Any],
        *,
        first: bool,
        answer: GeneratedSample | None,
    ) -> list[dict[str, Any]]:
        reasoning, text = parts
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if reasoning and self._placing == "apart":
            delta["reasoning_content"] = reasoning
        if text or (first and self._placing == "content"):
            delta["content"] = text
        entries = []
        if delta or logprobs or ids:
            entries.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **ids})
        if answer is not None:
            entries.append({"index": index, "delta": {}, "logprobs": None, **ending(answer)})
        return entries
