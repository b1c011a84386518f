"""The answer of `/v1/chat/completions`: a message.

Reasoning that is told apart from the answer is `reasoning_content`, as with DeepSeek's own API.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from distill.logprobs import Scored, TokenLogprobs
from teacher.engine.detokenizer import UNSPELLABLE
from teacher.engine.stopping import RepetitionLimit
from teacher.http.chat_request import ChatRequest
from teacher.http.form import Form, Offsets, Spell
from teacher.http.parts import Call, Parts, Splitter, Undivided
from teacher.http.reasoning import Beginning, Reasoning
from teacher.http.tool_calls import CallReader, call_reader
from teacher.live import CallFormat, RequestOptions

# What becomes of the reasoning in a chat message: a part of its content, a field of its own, or nothing.
ReasoningPlace = Literal["content", "apart", "out"]


class ChatSplitter:
    """Tells reasoning, words and calls apart; no call is looked for in the reasoning."""

    def __init__(self, reasoning: Reasoning, reader: CallReader | None = None) -> None:
        self._reasoning, self._reader = reasoning, reader

    def feed(self, piece: str) -> Parts:
        return self._parts(*self._reasoning.feed(piece))

    def rest(self) -> Parts:
        parts = self._parts(*self._reasoning.rest())
        return parts if self._reader is None else parts.then(Parts("", *self._reader.rest()))

    def _parts(self, thought: str, answer: str) -> Parts:
        return Parts(thought, answer) if self._reader is None else Parts(thought, *self._reader.feed(answer))


class ChatForm(Form[ChatRequest]):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request: ChatRequest,
        spell: Spell,
        *,
        reasoning: ReasoningPlace = "content",
        call_format: CallFormat | None = None,
    ) -> None:
        """`reasoning` is its place where the request does not say. `call_format` is there where calls may come."""
        super().__init__(request, spell)
        self._call_format = call_format
        said: dict[bool | None, ReasoningPlace] = {None: reasoning, True: "apart", False: "out"}
        self._placing = said[request.include_reasoning]

    def options(self, repetition: RepetitionLimit | None) -> RequestOptions:
        options = super().options(repetition)
        if self._call_format is None:
            return options
        return replace(options, grammar=self.request.call_grammar(self._call_format))

    def splitter(self) -> Splitter:
        request, form = self.request, self._call_format
        together = self._placing == "content"
        if form is None:
            return Undivided() if together else ChatSplitter(Reasoning("ended" if request.has_thought else "open"))
        begins: Beginning = "ended" if request.has_thought else "marked"
        if not request.has_thought and (request.is_thinking or not together):
            begins = "open"
        names = [tool.function.name for tool in request.offered]
        reader = call_reader(form, names, parallel=request.parallel_tool_calls)
        return ChatSplitter(Reasoning(begins, keeps_tags=together), reader)

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

    def content(self, parts: Parts) -> dict[str, Any]:
        """An answer that is calls alone, or ended within the reasoning, has no content: null, as with vLLM."""
        message: dict[str, Any] = {"role": "assistant"}
        if self._placing == "apart":
            message["reasoning_content"] = parts.reasoning or None
        text = self._text(parts)
        message["content"] = text or (None if parts.calls or self._placing != "content" else "")
        if parts.calls:
            message["tool_calls"] = [_told(call) for call in parts.calls]
        return {"message": message}

    def _text(self, parts: Parts) -> str:
        return parts.reasoning + parts.text if self._placing == "content" else parts.text

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
        text = self._text(parts)
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if parts.reasoning and self._placing == "apart":
            delta["reasoning_content"] = parts.reasoning
        if text or (first and self._placing == "content"):
            delta["content"] = text
        if parts.calls:
            delta["tool_calls"] = [{"index": call.number, **_told(call)} for call in parts.calls]
        entries = []
        if delta or logprobs or ids:
            entries.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **ids})
        if end is not None:
            entries.append({"index": index, "delta": {}, "logprobs": None, **end})
        return entries


def _told(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
