"""An OpenAI-compatible HTTP server over any Teacher, and over nothing but the Teacher protocol.

    GET  /health   /version   /v1/models
    POST /v1/completions   /v1/chat/completions      (streaming and not)

A Teacher yields whole completions, so a stream carries each sample in one piece when it is finished; the text keeps the
opening `<think>` that the chat template wrote. There is no authentication: bind to a loopback address, or put a proxy
in front.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import json
import queue
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from distill.errors import PotstillError, Preempted, UserInputError
from distill.protocols import Teacher
from distill.records import Completion, Sampling
from teacher.serve.batching import Batcher, Live, LiveTeacher
from teacher.serve.messages import ChatRequest, CompletionRequest, Request, error_body, usage

MAX_BODY_BYTES = 8 * 2**20
SHUTDOWN_S = 60


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.response = JSONResponse(error_body(message, kind=kind, param=param, code=code), status)


class Server:
    """The routes' state: the batcher, the model's name and the defaults for what a request leaves out."""

    def __init__(self, teacher: Teacher, *, model: str, sampling: Sampling, max_batch: int, max_waiting: int) -> None:
        self.model = model
        self.sampling = sampling
        self.batcher: Batcher | Live
        if isinstance(teacher, LiveTeacher):
            self.batcher = Live(teacher, max_unfinished=max_waiting + max_batch)
        else:
            self.batcher = Batcher(teacher, max_batch=max_batch, max_waiting=max_waiting)
        self.started = int(time.time())
        self._indices = itertools.count()

    async def health(self, _: HTTPRequest) -> Response:
        return Response()

    async def version(self, _: HTTPRequest) -> Response:
        return JSONResponse({"version": importlib.metadata.version("potstill")})

    async def models(self, _: HTTPRequest) -> Response:
        entry = {"id": self.model, "object": "model", "created": self.started, "owned_by": "potstill"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def completions(self, http: HTTPRequest) -> Response:
        return await self._answer(await self._read(http, CompletionRequest), _TextForm)

    async def chat_completions(self, http: HTTPRequest) -> Response:
        return await self._answer(await self._read(http, ChatRequest), _ChatForm)

    async def _read(self, http: HTTPRequest, form: type[Request]) -> Request:
        body = bytearray()
        async for piece in http.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"the body is over {MAX_BODY_BYTES} bytes")
        try:
            request = form.model_validate(json.loads(body))
        except (ValueError, UnicodeDecodeError) as exc:
            if not isinstance(exc, ValidationError):
                raise Refused(400, f"the body is not JSON: {exc}") from exc
            fault = exc.errors()[0]
            param = ".".join(str(part) for part in fault["loc"]) or None
            raise Refused(400, f"{param}: {fault['msg']}" if param else fault["msg"], param=param) from exc
        if request.model != self.model:
            raise Refused(
                404,
                f"model: {request.model!r} is not served, {self.model!r} is",
                param="model",
                code="model_not_found",
            )
        return request

    async def _answer(self, request: Request, form: type[_Form]) -> Response:
        wanted = request.trace_requests(0)
        if request.seed is None:
            first = next(self._indices)
            for _ in wanted[1:]:
                next(self._indices)
            wanted = request.trace_requests(first)
        try:
            submitted = self.batcher.submit(wanted, request.sampling(self.sampling))
        except queue.Full as exc:
            raise Refused(429, "too many requests are waiting; try again later") from exc
        futures = [asyncio.wrap_future(future) for future in submitted]
        writer = form(request)
        if request.stream:
            return StreamingResponse(_events(writer, futures), media_type="text/event-stream")
        try:
            done = await asyncio.gather(*futures)
        except PotstillError as exc:
            raise Refused(400 if isinstance(exc, UserInputError) else 500, str(exc)) from exc
        finally:
            for future in futures:
                future.cancel()
        return JSONResponse(writer.whole(done))


async def _events(writer: _Form, futures: list[asyncio.Future[Completion]]) -> AsyncIterator[str]:
    """Server-sent events: every sample as it finishes, then the usage if it was asked for, then `[DONE]`."""

    async def numbered(index: int, future: asyncio.Future[Completion]) -> tuple[int, Completion]:
        return index, await future

    finished: dict[int, Completion] = {}
    tasks = [asyncio.ensure_future(numbered(index, future)) for index, future in enumerate(futures)]
    try:
        for task in asyncio.as_completed(tasks):
            index, completion = await task
            finished[index] = completion
            for chunk in writer.chunks(index, completion):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        options = writer.request.stream_options
        if options is not None and options.include_usage:
            counts = usage([finished[index] for index in sorted(finished)], n=writer.request.n)
            yield f"data: {json.dumps({**writer.head(chunk=True), 'choices': [], 'usage': counts})}\n\n"
    except PotstillError as exc:
        yield f"data: {json.dumps(error_body(str(exc), kind='server_error'))}\n\n"
    finally:
        for task in tasks:
            task.cancel()
    yield "data: [DONE]\n\n"


class _Form(ABC):
    """How one answer is written down; the two endpoints differ in the shape of a choice."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: Request) -> None:
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = self.chunk_object if chunk else self.whole_object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        choices = [self.choice(index, *self._text(completion)) for index, completion in enumerate(completions)]
        return {**self.head(chunk=False), "choices": choices, "usage": usage(completions, n=self.request.n)}

    def chunks(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        return [
            {**self.head(chunk=True), "choices": [choice]} for choice in self.deltas(index, *self._text(completion))
        ]

    def _text(self, completion: Completion) -> tuple[str, str]:
        text, stopped = self.request.cut(completion.text)
        return text, "stop" if stopped else completion.finish_reason

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """One entry of `choices` in an answer that comes whole."""

    @abstractmethod
    def deltas(self, index: int, text: str, finish_reason: str) -> list[dict[str, Any]]:
        """The entries of `choices` that a stream sends for it, one chunk each."""


class _TextForm(_Form):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def deltas(self, index: int, text: str, finish_reason: str) -> list[dict[str, Any]]:
        return [self.choice(index, text, finish_reason)]


class _ChatForm(_Form):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def deltas(self, index: int, text: str, finish_reason: str) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": text}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None},
            {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason},
        ]


def build_app(
    teacher: Teacher, *, model: str, sampling: Sampling, max_batch: int = 64, max_waiting: int = 4096
) -> Starlette:
    """The ASGI application; it owns `teacher` and closes it when it ends.

    `model` is the name that requests must give, `sampling` what they get where they say nothing, `max_batch` how many
    samples are generated together, `max_waiting` how many may wait before more are refused with 429.
    """
    server = Server(teacher, model=model, sampling=sampling, max_batch=max_batch, max_waiting=max_waiting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.batcher.close)

    async def refused(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, Refused)
        return exc.response

    async def not_found(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return JSONResponse(error_body(exc.detail, kind="invalid_request_error"), exc.status_code, exc.headers)

    app = Starlette(
        routes=[
            Route("/health", server.health),
            Route("/version", server.version),
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HTTPException: not_found},
        lifespan=lifespan,
    )
    app.state.batcher = server.batcher
    return app


def serve(app: Starlette, listener: socket.socket, *, ready: Callable[[], object]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, calling `ready` once requests are taken.

    Requests that are under way when the signal comes are finished first; then this returns.
    """
    import uvicorn

    class Ready(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    server = Ready(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S))
    with suppress(KeyboardInterrupt, Preempted):  # uvicorn raises the signal again after its orderly end
        server.run([listener])
