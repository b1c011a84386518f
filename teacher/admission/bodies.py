"""The body of a request, whole, within a limit of size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from teacher.admission.refusals import Refused

# A prompt of 128k token ids is one megabyte of JSON.
MAX_BODY_BYTES = 4 * 2**20
BODY_S = 60.0
# Of a body that was refused, so much is read and dropped.
MAX_DRAIN_BYTES, DRAIN_S = 64 * 2**20, 30.0
# What nginx writes down where the client has closed the connection; nobody reads it.
GONE = 499
TOO_LARGE = 413

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def read_body(headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> bytes:
    """Raises Refused for a body that is too large, compressed or too slow, and where the client leaves."""
    for name, value in headers:
        if name == b"content-length" and int(value) > MAX_BODY_BYTES:
            raise _too_large()
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise Refused(415, f"content-encoding: {value.decode('latin-1')!r} is not taken; send the body as it is")
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(BODY_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(GONE, "the client has left")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as exc:
        raise Refused(408, f"the body took over {BODY_S:g} s") from exc
    return bytes(body)


async def drain(receive: Receive) -> None:
    """Read what is left of a body before it is refused: servers that close a connection with bytes unread reset it, and
    the client never sees the answer. One that has more than `MAX_DRAIN_BYTES` is not waited for."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while num_bytes <= MAX_DRAIN_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large() -> Refused:
    return Refused(TOO_LARGE, f"the body is over {MAX_BODY_BYTES} bytes")
