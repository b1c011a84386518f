"""A request that is not let in, and the answer that it gets."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refused(Exception):
    """The status of the answer, what is said, and the field of the body that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, status=status, param=param, code=code)

    @property
    def encoded(self) -> bytes:
        return json.dumps(self.body).encode()

    async def answer(self, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer as an ASGI application."""
        body = self.encoded
        told = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
        await send({"type": "http.response.start", "status": self.status, "headers": told})
        await send({"type": "http.response.body", "body": body})


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
