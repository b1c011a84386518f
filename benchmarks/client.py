"""The client's overhead a request at 512 in flight, and generation through potstill's own server.

    python -m benchmarks.client [--concurrency 512] [--requests 4096] [--samples 512]

First part: a server in another process answers at once, whole or as a stream of 32 pieces. The bare rows send
prepared bytes over as many raw sockets and read until the answer's end: what server, kernel and event loop cost by
themselves. The rows above them make requests of samples and samples of answers; the difference is the client's. The
`openai` package asks for the same, if it is installed.

Second part: the teacher generates for the same questions in this process and behind `potstill serve` on this machine,
asked by the client over HTTP; both with one engine a core.

Results go to benchmarks/results/<device>/client.json.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import json
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device import device_name, write_result
from distill.cores import num_cores
from distill.errors import PotstillError
from distill.problems import load_problems
from distill.recipe import OpenAITeacher, ReasoningGymSource
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends.openai import OpenAICompatibleTeacher

if TYPE_CHECKING:
    from teacher.backends.native.backend import NativeBackend

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "teacher" / "pico"
PIECES = 32
TEXT = "and so it goes on. " * PIECES
USAGE = {"prompt_tokens": 9, "completion_tokens": 4 * PIECES, "total_tokens": 9 + 4 * PIECES}
END_OF_STREAM = b"data: [DONE]\n\n"


def main() -> None:
    arguments = parse_arguments()
    if arguments.serve:
        asyncio.run(serve())
        return
    names = ("aiohttp", "httpx", "openai")
    result: dict[str, Any] = {
        "device": device_name(),
        "versions": {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)},
        "shape": {"concurrency": arguments.concurrency, "requests": arguments.requests},
        "load_average": os.getloadavg()[0],
        "rows": overhead_rows(arguments.concurrency, arguments.requests),
        "generation": generation(arguments.samples) if arguments.samples else None,
    }
    path = write_result("client", result)
    print_table(result)
    print(f"\n{path.relative_to(ROOT)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=512, help="of the second part; 0 leaves it out")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the server that answers at once ----------------------------------------------------------------------------------


def answers() -> tuple[bytes, bytes]:
    """A whole answer and a streamed one, as bytes."""
    message = {"role": "assistant", "content": TEXT}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
    body = json.dumps(whole).encode()
    size = len(TEXT) // PIECES
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": TEXT[n * size : (n + 1) * size]}, "finish_reason": None}]}
        for n in range(PIECES)
    ]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]
    events = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + END_OF_STREAM
    return _response(body, "application/json"), _response(events, "text/event-stream")


def _response(body: bytes, kind: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Answering(asyncio.Protocol):
    """A server with as little HTTP as it takes."""

    whole, streamed = answers()
    models = _response(b'{"data": [{"id": "echo"}]}', "application/json")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            if len(self.received) < end + 4 + length:
                return
            body, self.received = self.received[end + 4 : end + 4 + length], self.received[end + 4 + length :]
            streamed = b'"stream": true' in body or b'"stream":true' in body
            answer = self.models if head.startswith(b"get") else self.streamed if streamed else self.whole
            self.transport.write(answer)  # type: ignore[attr-defined]


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def program(*command: str) -> Iterator[str]:
    """A program of this repository; yields the first line that it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{' '.join(command)} did not start")
        yield line
    finally:
        process.terminate()
        process.wait()


# --- overhead ---------------------------------------------------------------------------------------------------------


def overhead_rows(concurrency: int, num_requests: int) -> list[dict[str, Any]]:
    rows = []
    with program(sys.executable, "-m", "benchmarks.client", "--serve") as port:
        url = f"http://127.0.0.1:{port}/v1"
        for streamed in (False, True):
            kind = "streamed" if streamed else "whole"
            bare = measured(lambda s=streamed: asyncio.run(bare_loop(int(port), concurrency, num_requests, s)))
            ours = measured(lambda s=streamed: ask_as_teacher(url, concurrency, num_requests, s))
            row = {
                "name": kind,
                "bare": _each(bare, num_requests),
                "potstill": _each(ours, num_requests),
                "overhead_cpu_us": 1e6 * (ours[1] - bare[1]) / num_requests,
                "overhead_wall_us": 1e6 * (ours[0] - bare[0]) / num_requests,
                "peers": {},
            }
            if importlib.util.find_spec("openai"):
                fewer = max(concurrency, num_requests // 4)
                peer = measured(
                    lambda s=streamed, n=fewer: asyncio.run(ask_with_openai(url, concurrency, n, s)), times=1
                )
                name = f"openai {importlib.metadata.version('openai')}"
                row["peers"] = {name: {"requests": fewer, **_each(peer, fewer)}}
            rows.append(row)
    return rows


def measured(call: Callable[[], object], *, times: int = 2) -> tuple[float, float]:
    """Seconds on the wall and of this process's processor time, the best of several."""
    best = (float("inf"), float("inf"))
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu), key=lambda pair: pair[1])
    return best


def _each(seconds: tuple[float, float], num_requests: int) -> dict[str, float]:
    return {"wall_us": 1e6 * seconds[0] / num_requests, "cpu_us": 1e6 * seconds[1] / num_requests}


async def at_once(concurrency: int, num_requests: int, ask: Callable[[int], Awaitable[object]]) -> None:
    numbers = iter(range(num_requests))

    async def worker() -> None:
        for number in numbers:
            await ask(number)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def bare_loop(port: int, concurrency: int, num_requests: int, streamed: bool) -> None:
    """Prepared bytes over raw sockets: one send, and reads until the known end."""
    payload = {"model": "echo", "messages": [{"role": "user", "content": "x" * 100}], "stream": streamed}
    body = json.dumps(payload).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    size = len(Answering.streamed if streamed else Answering.whole)
    loop = asyncio.get_running_loop()
    sockets = []
    for _ in range(concurrency):
        connection = socket.socket()
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        sockets.append(connection)

    async def ask(_: int) -> None:
        connection = sockets.pop()
        await loop.sock_sendall(connection, request)
        left = size
        while left > 0:
            left -= len(await loop.sock_recv(connection, 65_536))
        sockets.append(connection)

    await at_once(concurrency, num_requests, ask)
    for connection in sockets:
        connection.close()


def ask_as_teacher(url: str, concurrency: int, num_requests: int, streamed: bool) -> None:
    config = OpenAITeacher(base_url=url, model="echo", max_concurrency=concurrency, stream=streamed)
    teacher = OpenAICompatibleTeacher(config, initial_concurrency=concurrency)
    problems = [Problem(prompt="x" * 100 + str(n), answer="1", grader="math", source="b") for n in range(num_requests)]
    requests = [TraceRequest(problem=problem, sample_index=0) for problem in problems]
    completions = list(teacher.generate(requests, Sampling(max_tokens=1024)))
    assert len(completions) == num_requests
    assert all(completion.text.endswith(TEXT) for completion in completions)


async def ask_with_openai(url: str, concurrency: int, num_requests: int, streamed: bool) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def ask(number: int) -> None:
            message = {"role": "user", "content": "x" * 100 + str(number)}
            settings = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 1024, "seed": number}
            if not streamed:
                answer = await client.chat.completions.create(model="echo", messages=[message], **settings)  # type: ignore[call-overload]
                assert answer.choices[0].message.content == TEXT
                return
            settings |= {"stream": True, "stream_options": {"include_usage": True}}
            chunks = await client.chat.completions.create(model="echo", messages=[message], **settings)  # type: ignore[call-overload]
            text = "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
            assert text == TEXT

        await at_once(concurrency, num_requests, ask)


# --- generation -------------------------------------------------------------------------------------------------------


def generation(num_samples: int) -> dict[str, Any] | None:
    """Tokens a second of the bundled teacher, directly and through its server; None where there is no teacher."""
    if not (BUNDLED / "config.json").exists():
        return None
    from teacher.backends.native.opening import open_native

    source = ReasoningGymSource(families="distill/problems/pico.yaml", count=num_samples, seed=5, split="held_out")
    problems = load_problems([source], base_dir=ROOT)[:num_samples]
    requests = [TraceRequest(problem=problem, sample_index=0) for problem in problems]
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=512, seed=5)
    backend = open_native(BUNDLED, batch_size=64)
    backend.max_workers = num_cores()
    list(directly(backend, requests[:8], sampling))  # engines are started by their first request
    direct = [rate(lambda: directly(backend, requests, sampling))]
    recipe = "pipelines/recipes/pico.yaml"
    serve_ = ("-c", "from pipelines.cli import main; main()", "serve", recipe, "--port", "0")
    with program(sys.executable, *serve_) as line:
        url = line.rpartition(" ")[2]
        config = OpenAITeacher(base_url=url, model=BUNDLED.name, max_concurrency=num_samples, think_prefilled=False)
        client = OpenAICompatibleTeacher(config, initial_concurrency=num_samples)
        list(client.generate(requests[:8], sampling))
        served = []
        for _ in range(2):
            served.append(rate(lambda: client.generate(requests, sampling)))
            direct.append(rate(lambda: directly(backend, requests, sampling)))
    backend.close()
    rates = {
        "direct": max(direct, key=lambda each: each["tokens_per_s"]),
        "through the server": max(served, key=lambda each: each["tokens_per_s"]),
    }
    share = rates["through the server"]["tokens_per_s"] / rates["direct"]["tokens_per_s"]
    return {"model": BUNDLED.name, "samples": len(requests), "batch": 64, **rates, "share": share}


def directly(backend: NativeBackend, requests: list[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
    """The same engines as the server's, given everything at once."""
    from teacher.live import GeneratedSample, GenerationRequest

    finished: queue.SimpleQueue[GeneratedSample | PotstillError] = queue.SimpleQueue()
    for request in requests:
        backend.submit(GenerationRequest(request), sampling, finished.put)
    for _ in requests:
        outcome = finished.get()
        assert isinstance(outcome, GeneratedSample), outcome
        yield outcome.completion


def rate(run: Callable[[], Iterator[Any]]) -> dict[str, float]:
    started = time.perf_counter()
    tokens = sum(completion.num_tokens for completion in run())
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['device']}, {result['shape']['concurrency']} requests in flight, microseconds a request")
    print(f"{'':28}{'wall':>10}{'cpu':>10}")
    for row in result["rows"]:
        lines = {"bare sockets": row["bare"], "potstill": row["potstill"], **row["peers"]}
        for name, each in lines.items():
            print(f"{row['name'] + ', ' + name:28}{each['wall_us']:10.0f}{each['cpu_us']:10.0f}")
        print(f"{row['name'] + ', overhead':28}{row['overhead_wall_us']:10.0f}{row['overhead_cpu_us']:10.0f}")
    if made := result["generation"]:
        direct, served = made["direct"]["tokens_per_s"], made["through the server"]["tokens_per_s"]
        print(f"generation: {direct:.0f} tokens/s directly, {served:.0f} through the server ({made['share']:.2f})")


if __name__ == "__main__":
    main()
