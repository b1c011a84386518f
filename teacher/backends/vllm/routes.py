"""The routes of a vLLM server of ours: generation, tokens, its model list, version and health. Everything else is 404.

vLLM's key covers `/v1` alone, while its other routes tell of the machine, scale the engine or run other APIs. This is
given to `vllm serve --middleware` and lies around all of them. /tokenize, which budget forcing asks, takes the key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

ALLOWED = {
    "/health",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/version",
}
KEYED = {"/tokenize"}  # beyond what vLLM itself guards

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AllowList:
    """ASGI middleware: passes requests for `ALLOWED` on, refuses other paths and every websocket."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_allowed(scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error":{"message":"no such route"}}'})


def _is_allowed(scope: Message) -> bool:
    if scope["path"] not in KEYED:
        return scope["path"] in ALLOWED
    given = dict(scope["headers"]).get(b"authorization", b"")
    return secrets.compare_digest(given, b"Bearer " + os.environ.get("VLLM_API_KEY", "").encode())
