"""Guards between the network and the routes: the key, and limits on how slowly and how much a client may send.

`KeyMiddleware` is ASGI middleware. `GuardedProtocol` is uvicorn's own HTTP protocol with a limit on the time and the
size of a request's head, which uvicorn does not have: sockets that open and send nothing, or a byte now and then (slow
loris), would stay for ever. The time of a body is the routes' to limit (`teacher.http.app`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from teacher.http.form import error_body

OPEN_ROUTES = {"/health"}
# Clients on a bad line need seconds for a head of a few hundred bytes; nobody needs a minute.
HEAD_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10


class KeyMiddleware:
    """Asks for `Authorization: Bearer KEY` on every route but `/health`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        body = _error("no API key was given, or a wrong one", code="invalid_api_key")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)


class GuardedProtocol(HttpToolsProtocol):
    """A connection whose next request's head must be there, whole, within `HEAD_S` and `MAX_HEAD_BYTES`.

    The clock starts with the connection and with the first byte after an answer; between them uvicorn's own limit on
    idle connections holds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alarm: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._alarm is None and (before is None or before.response_complete):
            self._expect_head()
        super().data_received(data)
        if self.cycle is not before:
            self._head_came()
        elif self._alarm is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(431, f"the request's head is over {MAX_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._end(400, msg)

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._alarm = self.loop.call_later(HEAD_S, self._end, 408, f"the request's head took over {HEAD_S:g} s")

    def _head_came(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _end(self, status: int, message: str) -> None:
        self._head_came()
        if self.transport.is_closing():
            return
        body = _error(message)
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _error(message: str, *, code: str | None = None) -> bytes:
    return json.dumps(error_body(message, kind="invalid_request_error", code=code)).encode()
