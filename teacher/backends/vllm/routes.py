"""The routes of a vLLM server of ours: generation, tokens, its model list, version and health. Everything else is 404.

vLLM's key covers `/v1` alone, while its other routes tell of the machine, scale the engine or run other APIs. This is
given to `vllm serve --middleware` and lies around all of them. /tokenize, which budget forcing asks, takes the key.
Who may ask and what is read is as with potstill's own server (`teacher.admission`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from teacher.admission.bodies import TOO_LARGE, Receive, drain, read_body
from teacher.admission.callers import check_caller
from teacher.admission.reader import Reader
from teacher.admission.refusals import Refused, Send

ALLOWED = {
    "/health",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/version",
}
KEYED = {"/tokenize"}  # beyond what vLLM itself guards
HOW_TO_OPEN = "set the key that teacher.api_key_env names"

Scope = MutableMapping[str, Any]


class AllowList:
    """ASGI middleware: passes requests for `ALLOWED` on, refuses other paths and every websocket."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._reader = Reader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._reader.start()
            try:
                await self.app(scope, receive, send)
            finally:
                await self._reader.close()
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                checked = await self._checked(scope, receive)
            except Refused as refused:
                if refused.status == TOO_LARGE:
                    await drain(receive)
                await refused.answer(send)
            else:
                await self.app(scope, checked, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What the application is to receive, once all of it is known to be fit."""
        if not self._key:
            check_caller(scope["method"], scope["headers"], how_to_open=HOW_TO_OPEN)
        has_key = _has_key(scope, self._key)
        if scope["path"] not in ALLOWED and not (scope["path"] in KEYED and has_key):
            raise Refused(404, "no such route")
        if scope["method"] != "POST" or not has_key:  # vLLM refuses whoever has none
            return receive
        body = await read_body(scope["headers"], receive)
        await self._reader.loads(body)
        waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        return again


def _has_key(scope: Scope, key: str) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not key or secrets.compare_digest(given, b"Bearer " + key.encode())
