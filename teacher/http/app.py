"""An OpenAI-compatible HTTP server over a `LiveTeacher`, which the native one is.

    GET  /health   /version   /v1/models   /v1/models/{id}   /metrics
    POST /v1/completions   /v1/chat/completions      (streaming and not)
    POST /tokenize

A stream carries each token when it is there (`teacher.http.stream`). While nothing comes there is a comment now and
then, so that whoever waits can tell a long answer from a dead server. The text keeps the opening `<think>` that the
chat template wrote, unless reasoning is told apart. Errors have OpenAI's shape.
With a key, every route but `/health` asks for it; without one only programs of this machine are answered
(`teacher.http.guard`, which `teacher.http.server` puts in front).

Nothing that grows with a request's size happens on the event loop: large bodies are read in a process of their own
(`teacher.admission.reader`), prompts are rendered and split into tokens on a thread (`teacher.http.lane`), as are large
answers put together.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import queue
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from distill.errors import PotstillError
from distill.records import Sampling
from teacher.admission.bodies import GONE, read_body
from teacher.admission.fields import Body
from teacher.admission.reader import SMALL_BYTES, Reader
from teacher.admission.refusals import Refused, error_body
from teacher.admission.wording import refusal_of
from teacher.engine.stopping import RepetitionLimit
from teacher.http.chat_form import ChatForm, ReasoningPlace
from teacher.http.chat_request import ChatRequest
from teacher.http.completion_form import TextForm
from teacher.http.completion_request import CompletionRequest, TokenizeRequest
from teacher.http.feed import SampleFeed, SampleFuture
from teacher.http.form import Form
from teacher.http.guard import KeyMiddleware
from teacher.http.lane import Lane, dumps_in_turns
from teacher.http.metrics import Metrics
from teacher.http.refusal import APIError, refusal_response
from teacher.http.request import Request
from teacher.http.stream import Stream, Wake, cancel, left
from teacher.live import CallFormat, GeneratedSample, LiveTeacher

# The validator looks at every field that it does not know before it says so of the first.
MAX_FIELDS = 256
# Prompts that may wait for their turn to be split into tokens: of a large body each, or of any.
MAX_LONG, MAX_SHORT = 16, 4_096
# More samples than these take milliseconds to begin.
FEW_SAMPLES = 64
# An answer of so many tokens, logprobs and token ids is put together on the event loop.
SMALL_ANSWER = 4_096

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
        self._reader = Reader()
        self._short, self._long = Lane("potstill-prompts", MAX_SHORT), Lane("potstill-long-prompts", MAX_LONG)

    async def start(self) -> None:
        await self._reader.start()

    async def close(self) -> None:
        """Finish what was begun, and let go of the teacher."""
        await self._reader.close()
        await asyncio.to_thread(self.feed.close)

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
        return await self._answer(http, TextForm(request, self.teacher.spell))

    async def chat_completions(self, http: HTTPRequest) -> Response:
        request = await self._read(http, ChatRequest)
        calls = await asyncio.to_thread(self._call_format) if request.offered else None
        form = ChatForm(request, self.teacher.spell, reasoning=self.reasoning, call_format=calls)
        return await self._answer(http, form)

    def _call_format(self) -> CallFormat:
        calls = self.teacher.call_format
        if calls is None:
            message = "Unsupported parameter: 'tools' is not supported with this model: its chat template has none."
            raise APIError(400, message, param="tools", code="unsupported_parameter")
        return calls

    async def tokenize(self, http: HTTPRequest) -> Response:
        request = await self._read(http, TokenizeRequest)

        def answer() -> str:
            tokens = self.teacher.encode(request.prompt, add_special_tokens=request.add_special_tokens)
            return dumps_in_turns({"count": len(tokens), "tokens": tokens})

        try:
            return _json(await self._lane(http.state.size).run(answer))
        except PotstillError as exc:
            raise APIError.because_of(exc) from exc
        except queue.Full as exc:
            raise _full() from exc

    async def _read(self, http: HTTPRequest, form: type[BodyType]) -> BodyType:
        body = await read_body(http.headers.raw, http.receive)
        tree = await self._reader.loads(body, max_length=self.teacher.max_characters)
        http.state.size = len(body)
        if isinstance(tree, dict) and len(tree) > MAX_FIELDS:
            raise APIError(400, f"the body has {len(tree)} fields; no request has more than {MAX_FIELDS}")
        try:
            request = form.model_validate(tree)
        except ValidationError as exc:
            raise refusal_of(exc, form) from exc
        self._check_model(request.model)  # type: ignore[attr-defined]  # every form has it
        return request

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"The model '{name}' does not exist; '{self.model}' does."
            raise APIError(404, message, param="model", code="model_not_found")

    async def _answer(self, http: HTTPRequest, form: Form[Any]) -> Response:
        wake = Wake() if form.request.stream else None
        samples = await self._submit(form, wake, http.state.size)
        if wake is not None:
            return Stream(form, samples, wake, self._count)
        futures = [asyncio.wrap_future(sample) for sample in samples]
        gone = asyncio.ensure_future(left(http.receive))
        gone.add_done_callback(lambda _: cancel(futures))
        try:
            done = await asyncio.gather(*futures)
            if sum(map(form.num_values, done)) <= SMALL_ANSWER:
                response = JSONResponse(form.whole(done))
            else:
                response = _json(await asyncio.to_thread(lambda: dumps_in_turns(form.whole(done))))
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
        return response

    async def _submit(self, form: Form[Any], wake: Wake | None, size_bytes: int) -> list[SampleFuture]:
        request: Request = form.request
        if (num_samples := request.num_samples()) > self.most_samples:
            message = f"Invalid 'n': {num_samples} samples are more than the {self.most_samples} that fit."
            raise APIError(400, message, param="n", code="integer_above_max_value")
        first = 0
        if request.seed is None:
            first, *_ = itertools.islice(self._indices, num_samples)

        def begin() -> list[SampleFuture]:
            wanted = request.generation_requests(first, form.options(self.repetition))
            return self.feed.submit(wanted, request.sampling(self.sampling), wake)

        try:
            return await self._lane(size_bytes, num_samples).run(begin)
        except queue.Full as exc:
            raise _full() from exc

    def _lane(self, size_bytes: int, num_samples: int = 1) -> Lane:
        return self._short if size_bytes <= SMALL_BYTES and num_samples <= FEW_SAMPLES else self._long

    def _count(self, answers: Sequence[GeneratedSample]) -> None:
        completions = [answer.completion for answer in answers]
        self.metrics.count_tokens(
            prompt=sum(completion.num_prompt_tokens for completion in completions),
            completion=sum(completion.num_tokens for completion in completions),
        )
        if drafted := sum(answer.num_drafts for answer in answers):
            self.metrics.count_drafts(accepted=sum(answer.num_accepted for answer in answers), drafted=drafted)


def _full() -> APIError:
    return APIError(429, "too many requests are waiting; try again later")


def _json(body: str) -> Response:
    return Response(body, media_type="application/json")


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
        await routes.start()
        try:
            yield
        finally:
            await routes.close()

    async def refused(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, Refused)
        return refusal_response(exc)

    async def not_found(_: HTTPRequest, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return JSONResponse(error_body(exc.detail, status=exc.status_code), exc.status_code, exc.headers)

    async def failed(_: HTTPRequest, exc: Exception) -> Response:
        return JSONResponse(error_body(f"{type(exc).__name__} in the server", status=500), 500)

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
        exception_handlers={Refused: refused, HTTPException: not_found, Exception: failed},
        lifespan=lifespan,
    )
    app.state.feed, app.state.metrics = routes.feed, routes.metrics
    app.state.asks_for_key = bool(api_key)
    return app
