"""An endpoint on loopback whose model has one token a character: ids, logprobs and continuations to check against.

What it writes depends on the question and on what is written already, as with a model: asked to go on, it goes on. It
speaks vLLM's dialect: `return_token_ids`, `return_tokens_as_token_ids`, `/tokenize`, `continue_final_message`, prompts
of token ids at `/completions`, `thinking_token_budget`.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint

END = "\n</think>\n\n"


def thought(question: str) -> str:
    a, b = (int(text) for text in re.findall(r"\d+", question))
    return f"The question is {a} plus {b}. Count on from {a}, {b} times: that is {a + b}."


def answer(question: str) -> str:
    a, b = (int(text) for text in re.findall(r"\d+", question))
    return f"\\boxed{{{a + b}}}"


def logprob(place: int) -> float:
    return -0.01 * (place % 50 + 1)


class SpellingEndpoint(ChatEndpoint):
    """`parses`: thinking and answer come apart, as behind a reasoning parser. `tells_ids`: it can return token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.parses = self.streams = False  # streams by itself, a character at a time
        self.tells_ids = True

    def more_routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        if not self.tells_ids:
            return Response("Not Found", 404)
        payload = await request.json()
        return JSONResponse({"count": len(payload["prompt"]), "tokens": [ord(c) for c in payload["prompt"]]})

    async def completions(self, request: Request) -> Response:
        payload = await request.json()
        self.payloads.append(payload)
        prompt = "".join(map(chr, payload["prompt"]))
        question, _, written = prompt.removeprefix("<user>").partition("<assistant><think>\n")
        return self._write(payload, question, written, prompt, chat=False)

    def _answer(self, payload: dict[str, Any]) -> Response:
        messages = payload["messages"]
        question, written = messages[0]["content"], ""
        if messages[-1]["role"] == "assistant":
            assert (payload["continue_final_message"], payload["add_generation_prompt"]) == (True, False)
            written = messages[-1]["content"].removeprefix("<think>\n")
        return self._write(payload, question, written, f"<user>{question}<assistant><think>\n{written}", chat=True)

    def _write(self, payload: dict[str, Any], question: str, written: str, prompt: str, *, chat: bool) -> Response:
        budget = payload.get("thinking_token_budget") or 10**6
        whole = thought(question)[:budget] + END + answer(question)
        if "</think>" in written:
            rest = answer(question)[len(written.partition("</think>")[2].lstrip("\n")) :]
        else:
            rest = whole[len(written) :]
        text, reason = rest[: payload["max_tokens"]], "stop" if len(rest) <= payload["max_tokens"] else "length"
        pieces = [self._choice(payload, text, written, place, len(prompt), chat=chat) for place in range(len(text))]
        pieces.append({"index": 0, "finish_reason": reason, **({"delta": {}} if chat else {"text": ""})})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": len(prompt) + len(text)}
        ids = payload.get("return_token_ids") and self.tells_ids
        head = {"prompt_token_ids": [ord(c) for c in prompt]} if ids else {}
        if not payload.get("stream"):
            return JSONResponse({**head, "choices": [_joined(pieces)], "usage": usage})
        chunks = [{"choices": [piece]} for piece in pieces]
        chunks[0] |= head
        return StreamingResponse(_events([*chunks, {"choices": [], "usage": usage}]), media_type="text/event-stream")

    def _choice(
        self, payload: dict[str, Any], text: str, written: str, place: int, start: int, *, chat: bool
    ) -> dict[str, Any]:
        character = text[place]
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if payload.get("return_token_ids") and self.tells_ids:
            choice["token_ids"] = [ord(character)]
        as_ids = payload.get("return_tokens_as_token_ids", False)
        named = [f"token_id:{ord(c)}" if as_ids else c for c in (character, "?")]
        values = [logprob(start + place), -5.0]
        if not chat:
            choice["text"] = character
            if payload.get("logprobs"):
                tops = [dict(zip(named, values, strict=True))]
                choice["logprobs"] = {"tokens": named[:1], "token_logprobs": values[:1], "top_logprobs": tops}
            return choice
        end = text.find(END)
        if not self.parses or "</think>" in written or 0 <= end <= place - len(END):
            choice["delta"] = {"content": character}
        elif end < 0 or place < end:
            choice["delta"] = {"reasoning_content": character}
        else:
            choice["delta"] = {}  # the parser swallows the tag
        if payload.get("logprobs"):
            top = [{"token": name, "logprob": value} for name, value in zip(named, values, strict=True)][::-1]
            choice["logprobs"] = {"content": [{"token": named[0], "logprob": values[0], "top_logprobs": top}]}
        return choice


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of a chat answer as one choice."""
    names = ("reasoning_content", "content")
    message = {name: "".join(piece["delta"].get(name, "") for piece in pieces) for name in names}
    choice = {"index": 0, "message": message, "finish_reason": pieces[-1]["finish_reason"]}
    if "logprobs" in pieces[0]:
        choice["logprobs"] = {"content": [p["logprobs"]["content"][0] for p in pieces if "logprobs" in p]}
    if "token_ids" in pieces[0]:
        choice["token_ids"] = [p["token_ids"][0] for p in pieces if "token_ids" in p]
    return choice


async def _events(chunks: list[dict[str, Any]]) -> AsyncIterator[str]:
    for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"
