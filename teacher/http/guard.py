"""Guards between the network and the routes: who may ask, and limits on how slowly and how much a client may send.

`KeyMiddleware` and `LoopbackMiddleware` are ASGI middleware. `GuardedProtocol` is uvicorn's own HTTP protocol with what
that lacks: limits on the time and the size of a request's head (sockets that open and send nothing, or a byte now and
then, would stay for ever), a limit on connections, and an end that lets the client read its answer. The time and the
size of a body are limited where it is read (`teacher.admission.bodies`).
"""

from __future__ import annotations

import asyncio
import http
import resource
import secrets
from enum import Enum, auto
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from distill.recipe import SERVER_KEY_ENV
from teacher.admission.callers import check_caller
from teacher.admission.refusals import Refused

OPEN_ROUTES = {"/health"}
# Clients on a bad line need seconds for a head of a few hundred bytes; nobody needs a minute.
HEAD_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10
# More than a full queue's clients; each is an open file, and others are needed beside.
MAX_CONNECTIONS = 8_192
OTHER_FILES = 256
# A client that sends what was refused already, as most do before they look for an answer, is listened to for so long.
LINGER_S = 30.0
MAX_LINGER_BYTES = 64 * 2**20


class KeyMiddleware:
    """Asks for `Authorization: Bearer KEY` on every route but `/health`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        refused = Refused(401, "no API key was given, or a wrong one", code="invalid_api_key")
        await refused.answer(send, [(b"www-authenticate", b"Bearer")])

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)


class LoopbackMiddleware:
    """Answers programs of this machine, on every route: for a server without a key (`teacher.admission.callers`)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_caller(scope["method"], scope["headers"], how_to_open=f"set a key in ${SERVER_KEY_ENV}")
            except Refused as refused:
                await refused.answer(send)
                return
        await self.app(scope, receive, send)


class _Place(Enum):
    """What of a request comes next."""

    HEAD = auto()
    BODY = auto()
    NEXT_REQUEST = auto()


class GuardedProtocol(HttpToolsProtocol):
    """A connection whose next request's head must be there, whole, within `HEAD_S` and `MAX_HEAD_BYTES`.

    The clock starts with the connection and with the first byte after an answer; between them uvicorn's own limit on
    idle connections holds. An answer that ends the connection before its request has come whole is followed by an end
    of what is sent alone: were the socket closed with bytes unread, the client would get a reset and never the answer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alarm: asyncio.TimerHandle | None = None
        self._place = _Place.HEAD
        self._head_bytes = self._linger_bytes = self._num_requests = 0
        self.is_leaving = False
        self._fault = Refused(400, "this is no HTTP request")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        most = _most_connections()
        if len(self.connections) > most + OTHER_FILES // 2:  # not even for an answer
            transport.abort()
        elif len(self.connections) > most:
            self._refuse(Refused(503, f"there are {most} connections already; try again later"))
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.is_leaving:
            self._linger_bytes += len(data)
            if self._linger_bytes > MAX_LINGER_BYTES:
                self.transport.abort()
            return
        if self._place is _Place.NEXT_REQUEST:
            self._expect_head()
        num_requests = self._num_requests
        super().data_received(data)
        if self._place is _Place.HEAD and self._num_requests == num_requests:  # all of it is of this head
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Let an answer that is under way end; what has not come whole is not waited for."""
        if self._place is _Place.BODY and not self.is_leaving:
            self._refuse(Refused(503, "the server is ending"))
        if self.is_leaving:
            self.transport.close()
        else:
            super().shutdown()

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._place is _Place.NEXT_REQUEST:
            self._expect_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._fault = _head_too_large()
            raise ValueError  # ends the parsing: `send_400_response` is next
        self._place = _Place.BODY
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._place = _Place.NEXT_REQUEST
        self._num_requests += 1
        super().on_message_complete()

    # What uvicorn does with a request.

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def answering(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.keep_alive = False  # who is refused early may not send the rest: the next head is not found
                await send(message)

            await app(scope, receive, sent)

        cycle.transport = _AnswersTransport(self)  # type: ignore[assignment]  # all that a cycle uses
        super()._start_asgi_task(cycle, answering)  # type: ignore[arg-type]  # starlette's names for ASGI's types

    def on_response_complete(self) -> None:
        if self.is_leaving:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self._place is _Place.HEAD:  # of a request that was sent ahead
            self._expect_head()

    def leave(self) -> None:
        """End the connection behind what was written, at once where the request has come whole."""
        self._stop_clock()
        self._unset_keepalive_if_required()
        if self._place is _Place.NEXT_REQUEST or self.transport.is_closing():
            self.transport.close()
            return
        self.is_leaving = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._alarm = self.loop.call_later(LINGER_S, self.transport.abort)

    def _expect_head(self) -> None:
        """Start the clock, unless an answer is under way: then what follows it may have to wait."""
        if self._place is _Place.NEXT_REQUEST:
            self._place, self._head_bytes = _Place.HEAD, 0
        if self._alarm is None and (self.cycle is None or self.cycle.response_complete):
            slow = Refused(408, f"the request's head took over {HEAD_S:g} s")
            self._alarm = self.loop.call_later(HEAD_S, self._refuse, slow)

    def _stop_clock(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _refuse(self, refused: Refused) -> None:
        """Answer, unless another answer has begun, and end the connection."""
        if self.is_leaving or self.transport.is_closing():
            return
        begun = self.cycle is not None and not self.cycle.response_complete
        if not (begun and self.cycle.response_started):
            body = refused.encoded
            lines = [
                f"HTTP/1.1 {refused.status} {http.HTTPStatus(refused.status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "connection: close",
            ]
            self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + body)
        if begun:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._place = _Place.BODY  # whatever else it was, more of it may come
        self.leave()


class _AnswersTransport:
    """A connection's transport as its answers have it: they leave instead of closing."""

    def __init__(self, protocol: GuardedProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        if not self._protocol.is_leaving:
            self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.is_leaving or self._protocol.transport.is_closing()

    def close(self) -> None:
        self._protocol.leave()


def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(soft - OTHER_FILES, 1))


def _head_too_large() -> Refused:
    return Refused(431, f"the request's head is over {MAX_HEAD_BYTES} bytes")
