"""What a vLLM server of ours answers: generation, its model list, its version, its health. Everything else is 404.

vLLM's key covers `/v1` alone, while its other routes tell of the machine, scale the engine or run other APIs. This is
given to `vllm serve --middleware` and lies around all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

ALLOWED = {
    "/health",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/version",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AllowList:
    """ASGI middleware: passes requests for `ALLOWED` on, refuses other paths and every websocket."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in ALLOWED):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error":{"message":"no such route"}}'})
