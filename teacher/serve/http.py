"""An OpenAI-compatible HTTP server over any Teacher.

    GET  /health   /version   /v1/models   /metrics
    POST /v1/completions   /v1/chat/completions      (streaming and not)
    POST /tokenize                                   (a LiveTeacher's)

A Teacher yields whole completions, so a stream carries each sample in one piece when it is finished, and a comment now
and then while it is not, so that whoever waits can tell a long answer from a dead server. The text keeps the opening
`<think>` that the chat template wrote. Going on from a beginning and token ids take a `LiveTeacher`, which the native
one is. Errors have OpenAI's shape. With a key, every route but `/health` asks for it (`teacher.serve.guard`).
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import itertools
import json
import queue
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from distill.errors import PotstillError, Preempted, UserInputError
from distill.protocols import Teacher
from distill.records import Sampling
from teacher.serve.batching import Batcher, Live, LiveTeacher, Written
from teacher.serve.forms import ChatForm, Form, Spell, TextForm, error_body, usage
from teacher.serve.guard import GuardedProtocol, Keyed
from teacher.serve.messages import ChatRequest, CompletionRequest, Request, TokenizeRequest
from teacher.serve.metrics import Metrics

# A prompt of 128k token ids is one megabyte of JSON.
MAX_BODY_BYTES = 4 * 2**20
BODY_S = 60.0
# How long an answer may lie unread.
UNREAD_S = 60.0
SHUTDOWN_S = 60
RETRY_AFTER_S = 1
# What nginx writes down where the client has closed the connection; nobody reads it.
GONE = 499
# Clients and proxies give a silent connection up after a minute or more.
KEEP_ALIVE_S = 15.0

Body = TypeVar("Body", bound=BaseModel)


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)

    @classmethod
    def because_of(cls, fault: PotstillError) -> Refused:
        """`param` is the request's own field, where it is that which is wrong."""
        param = fault.field if fault.where is None else None
        return cls(400 if isinstance(fault, UserInputError) else 500, str(fault), param=param)

    @property
    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)


class Server:
    """The routes' state: the batcher, the model's name and the defaults for what a request leaves out."""

    def __init__(self, teacher: Teacher, *, model: str, sampling: Sampling, max_batch: int, max_waiting: int) -> None:
        self.model = model
        self.sampling = sampling
        self.most_samples = max_waiting + max_batch
        self.batcher: Batcher | Live
        self.live = teacher if isinstance(teacher, LiveTeacher) else None
        if self.live is not None:
            self.batcher = Live(teacher, max_unfinished=self.most_samples)
        else:
            self.batcher = Batcher(teacher, max_batch=max_batch, max_waiting=max_waiting)
        self.metrics = Metrics(self.batcher.num_waiting)
        self.started = int(time.time())
        self._indices = itertools.count()

    async def health(self, _: HTTPRequest) -> Response:
        return Response()

    async def version(self, _: HTTPRequest) -> Response:
        return JSONResponse({"version": importlib.metadata.version("potstill")})

    async def models(self, _: HTTPRequest) -> Response:
        entry = {"id": self.model, "object": "model", "created": self.started, "owned_by": "potstill"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def metrics_text(self, _: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, http: HTTPRequest) -> Response:
        request = await self._read(http, CompletionRequest)
        return await self._answer(http, request, TextForm(request, self._spell))

    async def chat_completions(self, http: HTTPRequest) -> Response:
        request = await self._read(http, ChatRequest)
        return await self._answer(http, request, ChatForm(request, self._spell))

    async def tokenize(self, http: HTTPRequest) -> Response:
        request = await self._read(http, TokenizeRequest)
        if self.live is None:
            raise Refused(404, "this teacher does not tell its tokens")
        tokens = self.live.encode(request.prompt)
        return JSONResponse({"count": len(tokens), "tokens": tokens})

    @property
    def _spell(self) -> Spell | None:
        return None if self.live is None else self.live.spell

    async def _read(self, http: HTTPRequest, form: type[Body]) -> Body:
        body = await _body(http)
        try:
            request = form.model_validate(json.loads(body, parse_constant=_no_number))
        except RecursionError as exc:
            raise Refused(400, "the body is nested too deeply") from exc
        except (ValueError, UnicodeDecodeError) as exc:
            if not isinstance(exc, ValidationError):
                raise Refused(400, f"the body is not JSON: {exc}") from exc
            fault = exc.errors(include_url=False, include_input=False)[0]
            param = ".".join(str(part) for part in fault["loc"]) or None
            raise Refused(400, f"{param}: {fault['msg']}" if param else fault["msg"], param=param) from exc
        model: str = request.model  # type: ignore[attr-defined]  # every form has it
        if model != self.model:
            message = f"model: {model!r} is not served, {self.model!r} is"
            raise Refused(404, message, param="model", code="model_not_found")
        return request

    async def _answer(self, http: HTTPRequest, request: Request, form: Form[Any]) -> Response:
        if request.return_token_ids and self.live is None:
            raise Refused(400, "return_token_ids: this teacher does not tell its tokens", param="return_token_ids")
        futures = self._submit(request)
        if request.stream:
            return _Stream(form, futures, self._count)
        left = asyncio.ensure_future(_left(http.receive))
        left.add_done_callback(lambda _: _cancel(futures))
        try:
            done = [_with_logprobs(answer, request) for answer in await asyncio.gather(*futures)]
        except PotstillError as exc:
            raise Refused.because_of(exc) from exc
        except asyncio.CancelledError:
            if left.done():
                return Response(status_code=GONE)
            raise
        finally:
            left.cancel()
            _cancel(futures)
        self._count(done)
        return JSONResponse(form.whole(done))

    def _submit(self, request: Request) -> list[asyncio.Future[Written]]:
        if (num_samples := request.num_samples()) > self.most_samples:
            raise Refused(400, f"n: {num_samples} samples are more than the {self.most_samples} that fit", param="n")
        wanted = request.asked(0)
        if request.seed is None:
            first = next(self._indices)
            for _ in wanted[1:]:
                next(self._indices)
            wanted = request.asked(first)
        try:
            submitted = self.batcher.submit(wanted, request.sampling(self.sampling))
        except queue.Full as exc:
            raise Refused(429, "too many requests are waiting; try again later") from exc
        except UserInputError as exc:
            raise Refused.because_of(exc) from exc
        return [asyncio.wrap_future(future) for future in submitted]

    def _count(self, answers: Sequence[Written]) -> None:
        completions = [answer.completion for answer in answers]
        self.metrics.count_tokens(
            prompt=sum(completion.num_prompt_tokens for completion in completions),
            completion=sum(completion.num_tokens for completion in completions),
        )
        if drafted := sum(answer.num_drafts for answer in answers):
            self.metrics.count_drafts(accepted=sum(answer.num_accepted for answer in answers), drafted=drafted)


async def _body(http: HTTPRequest) -> bytes:
    if int(http.headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise Refused(413, f"the body is over {MAX_BODY_BYTES} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in http.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(413, f"the body is over {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as exc:
        raise Refused(GONE, "the client has left") from exc
    except TimeoutError as exc:
        raise Refused(408, f"the body took over {BODY_S:g} s") from exc
    return bytes(body)


def _no_number(name: str) -> NoReturn:
    """JSON has no NaN and no Infinity; Python's reader takes them unless it is told."""
    raise ValueError(f"{name} is no number")


def _cancel(futures: Sequence[asyncio.Future[Written]]) -> None:
    for future in futures:
        future.cancel()


def _with_logprobs(answer: Written, request: Request) -> Written:
    """The answer, if it has the logprobs that were asked for."""
    if request.num_logprobs() is not None and answer.completion.logprobs is None:
        raise UserInputError("this teacher keeps none", field="logprobs")
    return answer


class _Stream(Response):
    """Server-sent events: every sample as it finishes, then the usage if it was asked for, then `[DONE]`.

    What is ready goes out as one piece: each piece costs this process and the client a system call and a wake-up.
    starlette's own streams cost three times as much (a task group a request, `LOG.md`).
    """

    def __init__(
        self,
        form: Form[Any],
        futures: list[asyncio.Future[Written]],
        finished: Callable[[Sequence[Written]], object],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._form = form
        self._futures = futures
        self._finished = finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        left = asyncio.ensure_future(_left(receive))
        left.add_done_callback(lambda _: _cancel(self._futures))
        try:
            async for piece, more in self._pieces():
                async with asyncio.timeout(UNREAD_S):
                    await send({"type": "http.response.body", "body": piece.encode(), "more_body": more})
        except TimeoutError:
            pass  # uvicorn closes the connection of an answer without an end
        finally:
            left.cancel()
            _cancel(self._futures)

    async def _pieces(self) -> AsyncIterator[tuple[str, bool]]:
        """Text to send, and whether more follows; ends early where the client has gone."""
        pending = {future: index for index, future in enumerate(self._futures)}
        while pending:
            done, _ = await asyncio.wait(pending, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if any(future.cancelled() for future in done):
                return
            try:
                answers = [(pending.pop(future), future.result()) for future in sorted(done, key=pending.__getitem__)]
                piece = "".join(self._events(answers)) if answers else ": keep-alive\n\n"
            except PotstillError as exc:
                yield f"{_event(Refused.because_of(exc).body)}data: [DONE]\n\n", False
                return
            if pending:
                yield piece, True
        yield f"{piece}{self._usage()}data: [DONE]\n\n", False

    def _events(self, answers: list[tuple[int, Written]]) -> Iterator[str]:
        self._finished([answer for _, answer in answers])
        for index, answer in answers:
            for chunk in self._form.chunks(index, _with_logprobs(answer, self._form.request)):
                yield _event(chunk)

    def _usage(self) -> str:
        options = self._form.request.stream_options
        if options is None or not options.include_usage:
            return ""
        counts = usage([future.result() for future in self._futures], n=self._form.request.n)
        return _event({**self._form.head(chunk=True), "choices": [], "usage": counts})


def _event(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"


async def _left(receive: Receive) -> None:
    """Return once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def build_app(
    teacher: Teacher,
    *,
    model: str,
    sampling: Sampling,
    max_batch: int = 64,
    max_waiting: int = 4096,
    api_key: str = "",
) -> Starlette:
    """The ASGI application; it owns `teacher` and closes it when it ends.

    `model` is the name that requests must give, `sampling` what they get where they say nothing, `max_batch` how many
    samples are generated together, `max_waiting` how many may wait before more are refused with 429. With `api_key`
    every route but `/health` asks for it.
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

    async def failed(_: HTTPRequest, exc: Exception) -> Response:
        return JSONResponse(error_body(f"{type(exc).__name__} in the server", kind="server_error"), 500)

    routes = [
        Route("/health", server.health),
        Route("/version", server.version),
        Route("/metrics", server.metrics_text),
        Route("/v1/models", server.models),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
    ]
    known = frozenset(route.path for route in routes)
    middleware = [Middleware(server.metrics.middleware, known)]  # the outermost: it counts what is refused
    if api_key:
        middleware.append(Middleware(Keyed, api_key))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={Refused: refused, HTTPException: not_found, Exception: failed},
        lifespan=lifespan,
    )
    app.state.batcher, app.state.metrics = server.batcher, server.metrics
    return app


def serve(app: Starlette, listener: socket.socket, *, ready: Callable[[], object]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, calling `ready` once requests are taken.

    Requests that are under way when the signal comes are finished first; then this returns.
    """
    import uvicorn

    class Ready(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # What has been imported and loaded stays: every full collection would look through it all again, which
            # is 0.3 s with torch and transformers.
            gc.collect()
            gc.freeze()
            ready()

    server = Ready(
        uvicorn.Config(app, log_level="error", http=GuardedProtocol, ws="none", timeout_graceful_shutdown=SHUTDOWN_S)
    )
    try:
        with suppress(KeyboardInterrupt, Preempted):  # uvicorn raises the signal again after its orderly end
            server.run([listener])
    finally:
        gc.unfreeze()
