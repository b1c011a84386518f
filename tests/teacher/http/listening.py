"""An application behind a real socket as `serve` puts it there, and what it says to bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette

from teacher.http.server import guarded
from tests.loopback import Address, on_loopback


@contextmanager
def listening(app: Starlette) -> Iterator[Address]:
    with on_loopback(guarded(app)) as address:
        yield address


def said(connection: socket.socket) -> tuple[int, Any]:
    """Status and body of an answer after which the server closes."""
    text = b""
    while piece := connection.recv(65_536):
        text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else None


def asked(address: Address, sent: bytes) -> tuple[int, Any]:
    """As `said`, to these bytes on a connection of their own."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(sent)
        return said(connection)


def posted(
    address: Address, body: bytes, *headers: str, host: str = "localhost", route: str = "/v1/chat/completions"
) -> tuple[int, Any]:
    """As `said`, to a body with its length and, unless `headers` have another, the type of JSON."""
    lines = [f"POST {route} HTTP/1.1", f"host: {host}", "connection: close", f"content-length: {len(body)}", *headers]
    if not any(line.startswith("content-type") for line in headers):
        lines.append("content-type: application/json")
    return asked(address, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def is_openai_error(body: Any) -> bool:
    return set(body["error"]) == {"message", "type", "param", "code"}
