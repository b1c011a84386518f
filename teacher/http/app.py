"""An OpenAI-compatible HTTP server over a `LiveTeacher`, which the native one is.

    GET  /health   /version   /v1/models   /v1/models/{id}   /metrics
    POST /v1/completions   /v1/chat/completions      (streaming and not)
    POST /tokenize

A stream carries each token when it is there (`teacher.http.stream`). While nothing comes there is a comment now and
then, so that whoever waits can tell a long answer from a dead server. The text keeps the opening `<think>` that the
chat template wrote, unless reasoning is told apart. Errors have OpenAI's shape.
With a key, every route but `/health` asks for it (`teacher.http.guard`).
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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from distill.errors import PotstillError, Preempted
from distill.records import Sampling
from teacher.engine.stopping import RepetitionLimit
from teacher.http.body import Body
from teacher.http.chat_form import ChatForm, ReasoningPlace
from teacher.http.chat_request import ChatRequest
from teacher.http.completion_form import TextForm
from teacher.http.completion_request import CompletionRequest, TokenizeRequest
from teacher.http.feed import SampleFeed, SampleFuture
from teacher.http.form import Form, error_body
from teacher.http.guard import GuardedProtocol, KeyMiddleware
from teacher.http.metrics import Metrics
from teacher.http.refusal import APIError
from teacher.http.request import Request
from teacher.http.stream import Stream, Wake, cancel, left
from teacher.http.wording import refusal_of
from teacher.live import CallFormat, GeneratedSample, LiveTeacher

# A prompt of 128k token ids is one megabyte of JSON.
MAX_BODY_BYTES = 4 * 2**20
BODY_S = 60.0
SHUTDOWN_S = 60
# What nginx writes down where the client has closed the connection; nobody reads it.
GONE = 499

BodyType = TypeVar("BodyType", bound=Body)


class Endpoints:
    """The routes and their state: the feed, the model's name and the defaults for what a request leaves out."""

    def __init__(
        self,
        teacher: LiveTeacher,
        *,
        model: str,
        sampling: Sampling,
        max_batch: int,
        max_waiting: int,
        reasoning: ReasoningPlace,
        repetition: RepetitionLimit | None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.reasoning = reasoning
        self.repetition = repetition
        self.most_samples = max_waiting + max_batch
        self.teacher = teacher
        self.feed = SampleFeed(teacher, max_unfinished=self.most_samples)
        self.metrics = Metrics(self.feed.num_unfinished, teacher.gauges)
        self.started = int(time.time())
        self._indices = itertools.count()

    async def health(self, _: HTTPRequest) -> Response:
        return Response(status_code=200 if self.feed.fault is None else 503)

    async def version(self, _: HTTPRequest) -> Response:
        return JSONResponse({"version": importlib.metadata.version("potstill")})

    async def models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry]})

    async def one_model(self, http: HTTPRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._entry)

    @property
    def _entry(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "potstill"}

    async def metrics_text(self, _: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, http: HTTPRequest) -> Response:
        request = await self._read(http, CompletionRequest)
        return await self._answer(http, request, TextForm(request, self.teacher.spell))

    async def chat_completions(self, http: HTTPRequest) -> Response:
        request = await self._read(http, ChatRequest)
        calls = await asyncio.to_thread(self._call_format) if request.function_names else None
        form = ChatForm(request, self.teacher.spell, reasoning=self.reasoning, call_format=calls)
        return await self._answer(http, request, form)

    def _call_format(self) -> CallFormat:
        calls = self.teacher.call_format
        if calls is None:
            message = "Unsupported parameter: 'tools' is not supported with this model: its chat template has none."
            raise APIError(400, message, param="tools", code="unsupported_parameter")
        return calls

    async def tokenize(self, http: HTTPRequest) -> Response:
        request = await self._read(http, TokenizeRequest)
        tokens = self.teacher.encode(request.prompt, add_special_tokens=request.add_special_tokens)
        return JSONResponse({"count": len(tokens), "tokens": tokens})

    async def _read(self, http: HTTPRequest, form: type[BodyType]) -> BodyType:
        body = await _body(http)
        try:
            request = form.model_validate(json.loads(body, parse_constant=_no_number))
        except RecursionError as exc:
            raise APIError(400, "the body is nested too deeply") from exc
        except (ValueError, UnicodeDecodeError) as exc:
            if not isinstance(exc, ValidationError):
                raise APIError(400, f"the body is not JSON: {exc}") from exc
            raise refusal_of(exc, form) from exc
        self._check_model(request.model)  # type: ignore[attr-defined]  # every form has it
        return request

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"The model '{name}' does not exist; '{self.model}' does."
            raise APIError(404, message, param="model", code="model_not_found")

    async def _answer(self, http: HTTPRequest, request: Request, form: Form[Any]) -> Response:
        if request.stream:
            wake = Wake()
            return Stream(form, self._submit(request, wake), wake, self._count)
        futures = [asyncio.wrap_future(sample) for sample in self._submit(request)]
        gone = asyncio.ensure_future(left(http.receive))
        gone.add_done_callback(lambda _: cancel(futures))
        try:
            done = await asyncio.gather(*futures)
            whole = form.whole(done)
        except PotstillError as exc:
            raise APIError.because_of(exc) from exc
        except asyncio.CancelledError:
            if gone.done():
                return Response(status_code=GONE)
            raise
        finally:
            gone.cancel()
            cancel(futures)
        self._count(done)
        return JSONResponse(whole)

    def _submit(self, request: Request, wake: Wake | None = None) -> list[SampleFuture]:
        if (num_samples := request.num_samples()) > self.most_samples:
            message = f"Invalid 'n': {num_samples} samples are more than the {self.most_samples} that fit."
            raise APIError(400, message, param="n", code="integer_above_max_value")
        options = request.options(self.repetition)
        wanted = request.generation_requests(0, options)
        if request.seed is None:
            first = next(self._indices)
            for _ in wanted[1:]:
                next(self._indices)
            wanted = request.generation_requests(first, options)
        try:
            return self.feed.submit(wanted, request.sampling(self.sampling), wake)
        except queue.Full as exc:
            raise APIError(429, "too many requests are waiting; try again later") from exc

    def _count(self, answers: Sequence[GeneratedSample]) -> None:
        completions = [answer.completion for answer in answers]
        self.metrics.count_tokens(
            prompt=sum(completion.num_prompt_tokens for completion in completions),
            completion=sum(completion.num_tokens for completion in completions),
        )
        if drafted := sum(answer.num_drafts for answer in answers):
            self.metrics.count_drafts(accepted=sum(answer.num_accepted for answer in answers), drafted=drafted)


async def _body(http: HTTPRequest) -> bytes:
    if int(http.headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise APIError(413, f"the body is over {MAX_BODY_BYTES} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in http.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise APIError(413, f"the body is over {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as exc:
        raise APIError(GONE, "the client has left") from exc
    except TimeoutError as exc:
        raise APIError(408, f"the body took over {BODY_S:g} s") from exc
    return bytes(body)


def _no_number(name: str) -> NoReturn:
    """JSON has no NaN and no Infinity; Python's reader takes them unless it is told."""
    raise ValueError(f"{name} is no number")


def build_app(
    teacher: LiveTeacher,
    *,
    model: str,
    sampling: Sampling,
    max_batch: int = 64,
    max_waiting: int = 4096,
    api_key: str = "",
    reasoning: ReasoningPlace = "content",
    repetition: RepetitionLimit | None = None,
) -> Starlette:
    """The ASGI application; it owns `teacher` and closes it when it ends.

    `model` is the name that requests must give, `sampling` what they get where they say nothing, `max_batch` how many
    samples the teacher generates together, `max_waiting` how many more may wait before others are refused with 429.
    With `api_key` every route but `/health` asks for it. `reasoning` is its place in a chat message and `repetition`
    what ends a text that loops, where a request does not say.
    """
    routes = Endpoints(
        teacher,
        model=model,
        sampling=sampling,
        max_batch=max_batch,
        max_waiting=max_waiting,
        reasoning=reasoning,
        repetition=repetition,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(routes.feed.close)

    async def refused(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, APIError)
        return exc.response

    async def not_found(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return JSONResponse(error_body(exc.detail, kind="invalid_request_error"), exc.status_code, exc.headers)

    async def failed(_: HTTPRequest, exc: Exception) -> Response:
        return JSONResponse(error_body(f"{type(exc).__name__} in the server", kind="server_error"), 500)

    table = [
        Route("/health", routes.health),
        Route("/version", routes.version),
        Route("/metrics", routes.metrics_text),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.one_model),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/v1/completions", routes.completions, methods=["POST"]),
        Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
    ]
    known = frozenset(route.path for route in table)
    middleware = [Middleware(routes.metrics.middleware, known)]  # the outermost: it counts what is refused
    if api_key:
        middleware.append(Middleware(KeyMiddleware, api_key))
    app = Starlette(
        routes=table,
        middleware=middleware,
        exception_handlers={APIError: refused, HTTPException: not_found, Exception: failed},
        lifespan=lifespan,
    )
    app.state.feed, app.state.metrics = routes.feed, routes.metrics
    return app


def serve(app: Starlette, listener: socket.socket, *, ready: Callable[[], object]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, calling `ready` once requests are taken.

    Requests that are under way when the signal comes are finished first; then this returns. Raises what ended the
    teacher, if something did, or why it is to be given no more.
    """
    import uvicorn

    class Ready(uvicorn.Server):
        fault: PotstillError | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # What has been imported and loaded stays: every full collection would look through it all again, which
            # is 0.3 s with torch and transformers.
            gc.collect()
            gc.freeze()
            ready()

        async def on_tick(self, counter: int) -> bool:
            self.fault = app.state.feed.fault
            return await super().on_tick(counter) or self.fault is not None

    server = Ready(
        uvicorn.Config(app, log_level="error", http=GuardedProtocol, ws="none", timeout_graceful_shutdown=SHUTDOWN_S)
    )
    try:
        with suppress(KeyboardInterrupt, Preempted):  # uvicorn raises the signal again after its orderly end
            server.run([listener])
    finally:
        gc.unfreeze()
    if server.fault is not None:
        raise server.fault
