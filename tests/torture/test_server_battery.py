"""`potstill serve` on the bundled teacher against hostile crowds: nothing leaks, honest clients are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT
from tests.repository import REPOSITORY

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1_200)]
QUESTION = "State the final answer to the following arithmetic problem: 12 + 34 - 5 + 20 ="
QUEUE, BATCH = 32, 16
JSON = {"content-type": "application/json"}
# What the asking side's own event loop may be late by, on a machine that also runs the engines.
LATE_S = 0.1


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    url: str
    host: str
    port: int

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ["--port", "0", "--max-waiting", str(QUEUE), "--set", f"teacher.batch_size={BATCH}"]
    with subprocess.Popen(
        [*COMMAND, "serve", "pipelines/recipes/pico.yaml", *options],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        host, port = url.removeprefix("http://").split(":")
        yield Running(process, url, host, int(port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert process.stderr.read() == ""


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "pico", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}


async def ask(session: aiohttp.ClientSession, **fields: Any) -> tuple[int, float, dict[str, Any]]:
    begun = time.monotonic()
    async with session.post("/v1/chat/completions", json=body(**fields)) as answer:
        return answer.status, time.monotonic() - begun, await answer.json()


async def p95(session: aiohttp.ClientSession, *, seconds: float) -> float:
    """Four honest clients, each asking one question after another."""
    until = time.monotonic() + seconds
    times: list[float] = []

    async def client() -> None:
        while time.monotonic() < until:
            status, took, answer = await ask(session)
            assert status == 200
            assert answer["choices"][0]["message"]["content"].endswith("\\boxed{61}")
            times.append(took)

    await asyncio.gather(*(client() for _ in range(4)))
    return statistics.quantiles(times, n=20)[-1]


def against(server: Running, attack: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Run an attack between two looks at the process: files and memory are back afterwards, and it answers."""

    async def whole() -> None:
        async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
            assert (await ask(session))[0] == 200
            await attack(session)
            assert (await ask(session))[0] == 200

    files, memory = server.num_files(), server.resident_mib()
    asyncio.run(whole())
    deadline = time.monotonic() + 20
    while server.num_files() > files + 2:
        assert time.monotonic() < deadline, (files, server.num_files())
        time.sleep(0.1)
    assert server.process.poll() is None
    assert server.resident_mib() < memory + 64


def test_five_hundred_slow_sockets(server: Running) -> None:
    async def drip(stop: asyncio.Event) -> int:
        """A byte of a header every second, again from a new connection where this one is ended."""
        ended = 0
        while not stop.is_set():
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
            answer = asyncio.ensure_future(reader.read(64))
            while not stop.is_set() and not answer.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"a")
                    await writer.drain()
                await asyncio.sleep(1)
            if answer.done():
                assert answer.result().startswith(b"HTTP/1.1 408")
                ended += 1
            answer.cancel()
            writer.close()
        return ended

    async def attack(session: aiohttp.ClientSession) -> None:
        before = await p95(session, seconds=12)
        stop = asyncio.Event()
        sockets = [asyncio.ensure_future(drip(stop)) for _ in range(500)]
        during = await p95(session, seconds=24)
        stop.set()
        assert sum(await asyncio.gather(*sockets)) >= 500, "each was ended at least once"
        assert during <= 2 * before, (before, during)

    against(server, attack)


def test_two_hundred_clients_and_a_queue_of_thirty_two(server: Running) -> None:
    async def attack(session: aiohttp.ClientSession) -> None:
        answers = await asyncio.gather(*(ask(session, seed=seed, temperature=0.6) for seed in range(200)))
        served = [answer for answer in answers if answer[0] == 200]
        refused = [answer for answer in answers if answer[0] == 429]
        assert len(served) + len(refused) == 200
        assert len(served) >= QUEUE + BATCH
        assert refused
        assert all(error["error"]["type"] == "rate_limit_error" for _, _, error in refused)

        async def patient(seed: int) -> int:
            for attempt in range(200):
                async with session.post("/v1/chat/completions", json=body(seed=seed)) as answer:
                    if answer.status == 200:
                        return attempt
                    await asyncio.sleep(float(answer.headers["retry-after"]))
            raise AssertionError("never served")

        await asyncio.gather(*(patient(seed) for seed in range(200)))

    against(server, attack)


@pytest.mark.parametrize("stream", [False, True])
def test_a_thousand_disconnects(server: Running, stream: bool) -> None:
    async def unfinished(session: aiohttp.ClientSession) -> float:
        async with session.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("potstill_unfinished_samples")))

    async def drained(session: aiohttp.ClientSession, *, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while left := await unfinished(session):
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.02)

    async def attack(session: aiohttp.ClientSession) -> None:
        sent = json.dumps(body(stream=stream, n=4, temperature=5, max_tokens=500)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n\r\n".encode()

        async def leave(number: int) -> None:
            _, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(head + sent)
            await writer.drain()
            await asyncio.sleep(0.002 * (number % 50))
            writer.transport.abort()

        for start in range(0, 1_000, 50):
            await asyncio.gather(*(leave(start + number) for number in range(50)))
        # The last of them are heard of behind all others; then nothing is worked on.
        await drained(session, within_s=4)
        await leave(25)
        await drained(session, within_s=1)

    against(server, attack)


def test_errors_come_at_once_and_look_like_openai_s(server: Running) -> None:
    question = json.dumps(body())[:-1]
    cases = {
        "10 MB": (b" " * 10_000_000, 413),
        "100k deep": (b'{"messages": ' + b"[" * 100_000, 400),
        "NaN": (f'{question}, "top_p": NaN}}'.encode(), 400),
        "n of a billion": (f'{question}, "n": 1000000000}}'.encode(), 400),
        "no JSON": (b"\xff\xfe", 400),
        "another model": (json.dumps({**body(), "model": "r1"}).encode(), 404),
        "four megabytes of tokens": (json.dumps({"model": "pico", "prompt": [1] * 1_300_000}).encode(), 400),
    }

    async def attack(session: aiohttp.ClientSession) -> None:
        for name, (sent, status) in cases.items():
            for _ in range(5):
                begun = time.monotonic()
                async with session.post("/v1/chat/completions", data=sent, headers=JSON) as answer:
                    error = await answer.json()
                took = time.monotonic() - begun
                assert answer.status == status, name
                assert set(error["error"]) == {"message", "type", "param", "code"}
                assert took < 0.1 + LATE_S, (name, took)

    against(server, attack)
