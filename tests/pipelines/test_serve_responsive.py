"""`potstill serve` while four-megabyte bodies arrive: neither /health nor a stream that runs has to wait for them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT
from tests.repository import REPOSITORY

MOST_S = 0.1
ATTEMPTS = 3
SIZE = 4 * 10**6
# Answers each line at once: what a machine that does other things makes a server and its client wait.
CONTROL = """
import asyncio, sys
async def answer(reader, writer):
    while await reader.readline():
        writer.write(b"x\\n")
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
PADDING = "12 + 34 = 46, so "


def chat(content: str) -> dict[str, Any]:
    return {"model": "pico", "messages": [{"role": "user", "content": content}]}


BODIES: dict[str, tuple[str, bytes]] = {
    "a text": ("/v1/chat/completions", json.dumps(chat(PADDING * (SIZE // len(PADDING)))).encode()),
    "escapes": ("/v1/chat/completions", json.dumps(chat("\N{GRINNING FACE}" * (SIZE // 12))).encode()),
    "prompts that are just too long": (
        "/v1/completions",
        json.dumps({"model": "pico", "prompt": [f"{n} {PADDING * 3_500}" for n in range(SIZE // 60_000)]}).encode(),
    ),
    "token ids": ("/v1/completions", json.dumps({"model": "pico", "prompt": [1] * (SIZE // 3)}).encode()),
    "messages": (
        "/v1/chat/completions",
        json.dumps({"model": "pico", "messages": chat("1?")["messages"] * (SIZE // 36)}).encode(),
    ),
    "lists": ("/v1/chat/completions", b'{"model": "pico", "messages": [' + b"[]," * (SIZE // 3 - 20) + b"[]]}"),
    "objects": ("/v1/chat/completions", b'{"model": "pico", "messages": [' + b'{"":0},' * (SIZE // 7 - 20) + b"{}]}"),
    "keys": (
        "/v1/chat/completions",
        json.dumps({"model": "pico", **{f"{n:06}": n for n in range(SIZE // 17)}}).encode(),
    ),
    "a text to split": ("/tokenize", json.dumps({"model": "pico", "prompt": "9" * (SIZE - 100)}).encode()),
}


@dataclass
class Waits:
    """The longest in seconds: for /health, for the control, between two pieces of the stream."""

    health_s: float = 0.0
    control_s: float = 0.0
    gap_s: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """Of the server, whose engine is a thread of its process, and of the control."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
    command = [*COMMAND, "serve", "pipelines/recipes/pico.yaml", "--port", "0"]
    with (
        subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, **pipes) as server,
        subprocess.Popen([sys.executable, "-I", "-S", "-c", CONTROL], **pipes) as control,
    ):
        try:
            assert server.stdout is not None
            assert control.stdout is not None
            yield int(server.stdout.readline().split(":")[-1].removesuffix("/v1\n")), int(control.stdout.readline())
        finally:
            control.kill()
            server.terminate()
    assert server.returncode == 0


async def request(port: int, route: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {route} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
    return reader, writer


async def longest_wait(port: int, line: bytes, end: bytes, over: asyncio.Event) -> float:
    """Ask a hundred times a second, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    longest = 0.0
    while not over.is_set():
        begun = time.perf_counter()
        writer.write(line)
        await reader.readuntil(end)
        longest = max(longest, time.perf_counter() - begun)
        await asyncio.sleep(0.01)
    writer.close()
    return longest


async def longest_gap(port: int, running: asyncio.Event, over: asyncio.Event) -> float:
    """Of a stream that goes on until it is over, from its first token; from the second on it is `running`."""
    never_ends = {**chat("1 + 1?"), "stream": True, "max_tokens": 4_000, "logit_bias": {"2": -100}, "temperature": 1}
    longest = 0.0
    while not over.is_set():
        reader, writer = await request(port, "/v1/chat/completions", json.dumps(never_ends).encode())
        await reader.readuntil(b"\r\n\r\n")
        last = None
        while not over.is_set() and (line := await reader.readline()):
            if line.startswith(b'data: {"id"'):
                now = time.perf_counter()
                if last is not None:
                    longest = max(longest, now - last)
                    running.set()
                last = now
        writer.transport.abort()
    return longest


async def watch(ports: tuple[int, int], bodies: dict[str, tuple[str, bytes]], *, seconds: float) -> Waits:
    """Send the bodies for so long at least."""
    server, control = ports
    running, over = asyncio.Event(), asyncio.Event()
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    watching = [
        asyncio.ensure_future(longest_wait(server, health, b"\r\n\r\n", over)),
        asyncio.ensure_future(longest_wait(control, b"x\n", b"\n", over)),
        asyncio.ensure_future(longest_gap(server, running, over)),
    ]
    await running.wait()
    until = time.monotonic() + seconds
    statuses = {}
    for name, (route, body) in bodies.items():
        reader, writer = await request(server, route, body)
        statuses[name] = int((await reader.read()).split()[1])
        writer.close()
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    over.set()
    return Waits(*await asyncio.gather(*watching), statuses)


@pytest.mark.slow
def test_neither_health_nor_a_stream_waits_for_them(ports: tuple[int, int]) -> None:
    """What the control had to wait in the meantime is the machine's; a busy one gets other chances."""
    assert all(SIZE * 0.9 < len(body) <= 4 * 2**20 for _, body in BODIES.values())
    seen = []
    for _ in range(ATTEMPTS):
        quiet = asyncio.run(watch(ports, {}, seconds=2))
        busy = asyncio.run(watch(ports, BODIES, seconds=2))
        assert set(busy.statuses.values()) == {400}, busy.statuses
        seen.append((quiet, busy))
        if busy.health_s - busy.control_s < MOST_S and busy.gap_s - busy.control_s < max(
            MOST_S, quiet.gap_s + quiet.control_s
        ):
            return
    pytest.fail(f"waited: {seen}")
