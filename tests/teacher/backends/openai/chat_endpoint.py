"""A chat endpoint on loopback that answers like vLLM and fails as told: a real server, for tests of clients."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


async def _broken_off() -> AsyncIterator[bytes]:
    yield b'{"choices": [{"message": {"content": "it beg'
    raise ConnectionResetError


def dropped() -> Response:
    """An answer whose connection is cut in the middle."""
    return StreamingResponse(_broken_off(), headers={"content-length": "500"})


class ChatEndpoint:
    """Answers `a + b?` with worked reasoning, whose text shows the request's seed.

    `fault(number, payload)` may answer the number-th request in its place: None is no fault. While `hold(number)` is
    true the number-th request (counted from 1) waits, so that a test waits for what has happened and never for a time.
    """

    def __init__(self, *, model: str = "pico", key: str | None = None) -> None:
        self.model = model
        self.key = key
        self.version: str | None = "0.31.0"
        self.style = "prefilled"
        self.streams = self.counts = True
        self.breaks_off = False
        self.stall: Callable[[int], bool] = lambda number: False
        self.hold: Callable[[int], bool] = lambda number: False
        self.fault: Callable[[int, dict[str, Any]], Response | None] = lambda number, payload: None
        self.payloads: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.url = ""
        self.port = 0

    def more_routes(self) -> list[Route]:
        return []

    async def models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": [{"id": self.model}]})

    async def server_version(self, request: Request) -> Response:
        return JSONResponse({"version": self.version}) if self.version else Response("Not Found", 404)

    async def chat(self, request: Request) -> Response:
        payload = await request.json()
        self.payloads.append(payload)
        number = len(self.payloads)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            while self.hold(number) and not await request.is_disconnected():
                await asyncio.sleep(0.002)
            fault = self._refused(request) or self.fault(number, payload)
        finally:
            self.running -= 1
        if fault is not None:
            return fault
        answer = self._answer(payload)
        if answer.status_code == 200 and payload.get("stream") and self.streams:
            return StreamingResponse(
                self._streamed(json.loads(bytes(answer.body)), payload), media_type="text/event-stream"
            )
        return answer

    async def _streamed(self, answer: dict[str, Any], payload: dict[str, Any]) -> AsyncIterator[str]:
        """The answer in pieces of a few characters; `stall(number of pieces)` holds the stream for good."""
        (choice,) = answer["choices"]
        head = {"id": "x", "object": "chat.completion.chunk", "model": self.model}
        pieces: list[dict[str, Any]] = [{"role": "assistant"}]
        for name in ("reasoning_content", "reasoning", "content"):
            text = choice["message"].get(name, "")
            pieces += [{name: text[start : start + 7]} for start in range(0, len(text), 7)]
        yield ": keep-alive\n\n"
        for number, delta in enumerate(pieces):
            while self.stall(number):
                await asyncio.sleep(0.002)
            yield f"data: {json.dumps(head | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
        if self.breaks_off:
            return
        last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
        yield f"data: {json.dumps(head | {'choices': [last]})}\r\n\r\n"
        if payload.get("stream_options", {}).get("include_usage") and self.counts:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': answer['usage']})}\n\n"
        yield "data: [DONE]\n\n"

    def _refused(self, request: Request) -> Response | None:
        got = request.headers.get("authorization", "nothing")
        if self.key is None or got == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": f"Incorrect API key provided: {got}"}}, 401)

    def _answer(self, payload: dict[str, Any]) -> Response:
        if payload["model"] != self.model:
            return JSONResponse({"error": {"message": f"The model `{payload['model']}` does not exist."}}, 404)
        a, b = (int(text) for text in re.findall(r"\d+", payload["messages"][-1]["content"])[-2:])
        steps, answer = f"seed {payload['seed']}\n{a} + {b} = {a + b}", f"\\boxed{{{a + b}}}"
        message: dict[str, Any] = {"role": "assistant", "content": f"{steps}\n</think>\n\n{answer}"}
        if self.style != "prefilled":
            message = {"role": "assistant", "content": answer, self.style: f"\n{steps}\n"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


@contextmanager
def serving(endpoint: ChatEndpoint, *, tls: tuple[Path, Path] | None = None) -> Iterator[ChatEndpoint]:
    """Run the endpoint on a free port of loopback, on a thread, until the block ends. `tls`: key and certificate."""
    app = Starlette(
        routes=[
            Route("/v1/models", endpoint.models),
            Route("/version", endpoint.server_version),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            *endpoint.more_routes(),
        ]
    )
    key, made = tls or (None, None)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ssl_keyfile=key, ssl_certfile=made)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    endpoint.port = server.servers[0].sockets[0].getsockname()[1]
    endpoint.url = f"http://127.0.0.1:{endpoint.port}/v1"
    try:
        yield endpoint
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)
