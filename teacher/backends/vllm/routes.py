"""The routes of a vLLM server of ours: generation, tokens, its model list, version and health. Everything else is 404.

vLLM's key covers `/v1` alone, while its other routes tell of the machine, scale the engine or run other APIs. This is
given to `vllm serve --middleware` and lies around all of them. /tokenize, which budget forcing asks, takes the key.
Who may ask, what is read and which fields are taken is as with potstill's own server (`teacher.admission`).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from teacher.admission.bodies import TOO_LARGE, Receive, drain, read_body
from teacher.admission.callers import check_caller
from teacher.admission.reader import Reader
from teacher.admission.refusals import Refused, Send
from teacher.backends.vllm.fields import FORMS, known_fields, passed_on

ALLOWED = {
    "/health",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/version",
}
MODELS = "/v1/models/"  # and the name of one
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
                if scope["path"].startswith(MODELS):
                    await self._one_model(scope, receive, send)
                    return
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
        allowed = scope["path"] in ALLOWED or (scope["path"].startswith(MODELS) and scope["method"] == "GET")
        if not allowed and not (scope["path"] in KEYED and has_key):
            raise Refused(404, "no such route")
        if scope["method"] != "POST" or not has_key:  # vLLM refuses whoever has none
            return receive
        body = await read_body(scope["headers"], receive)
        body = self._fitted(scope, body, await self._reader.loads(body))
        waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        return again

    def _fitted(self, scope: Scope, body: bytes, tree: Any) -> bytes:
        """The body as vLLM is to read it (`teacher.backends.vllm.fields`), which sees for itself what is no object."""
        form = FORMS.get(scope["path"])
        known = known_fields(scope["app"].routes, scope["path"])
        if form is None or not known or not isinstance(tree, dict):
            return body
        kept = passed_on(tree, known, form)
        if kept == tree:
            return body
        # vLLM reads as many bytes as come; the length that the client has announced is of what it sent.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        return json.dumps(kept).encode()

    async def _one_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`/v1/models/ID`, which vLLM does not have, out of its list; what it says instead of one is passed on."""
        name = scope["path"].removeprefix(MODELS)
        said: list[dict[str, Any]] = []

        async def hear(message: dict[str, Any]) -> None:
            said.append(message)

        path = MODELS.rstrip("/")
        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, hear)
        if said[0]["status"] != 200:
            for message in said:
                await send(message)
            return
        listed = json.loads(b"".join(message.get("body", b"") for message in said[1:]))["data"]
        entry = next((entry for entry in listed if entry["id"] == name), None)
        if entry is None:
            served = ", ".join(repr(entry["id"]) for entry in listed)
            raise Refused(
                404, f"The model '{name}' does not exist; {served} does.", param="model", code="model_not_found"
            )
        body = json.dumps(entry).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _has_key(scope: Scope, key: str) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not key or secrets.compare_digest(given, b"Bearer " + key.encode())
