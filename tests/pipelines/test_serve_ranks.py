"""`potstill serve` and `generate` over ranks, as programs: two nodes on this machine, one endpoint in front."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, potstill
from tests.repository import REPOSITORY

openai = pytest.importorskip("openai", reason="the openai package comes with vLLM")
pytestmark = pytest.mark.slow

PICO = "pipelines/recipes/pico.yaml"
KEY = "sk-nodes-0917"
QUESTION = "State the final answer to the following arithmetic problem: 12 + 34 - 5 + 20 ="
ANSWER = "<think>\n12 + 34 = 46\n46 - 5 = 41\n41 + 20 = 61\n</think>\n\n\\boxed{61}"


class Nodes:
    """Both nodes' programs; `client` asks the first one."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks = {"num_ranks": 2, "num_nodes": 2, "head_address": "127.0.0.1", "rpc_port": port}
        self._set = [part for name, value in ranks.items() for part in ("--set", f"teacher.{name}={value}")]
        self.other = self.started("--node-rank", "1")
        self.head = self.started("--port", "0")
        announced = self.head.stdout.readline()
        assert announced.startswith("serving 'pico' on http://127.0.0.1:"), self.head.stderr.read()
        self.address = announced.split()[-1]
        self.client = openai.OpenAI(base_url=self.address, api_key=KEY, max_retries=0)

    def started(self, *arguments: str, key: str = KEY) -> subprocess.Popen[str]:
        command = [*COMMAND, "serve", PICO, *self._set, *arguments]
        environment = {**ENVIRONMENT, "POTSTILL_API_KEY": key}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes)

    def ask(self, **changes: Any) -> Any:
        messages = [{"role": "user", "content": QUESTION}]
        settings = {"model": "pico", "messages": messages, "temperature": 0, **changes}
        return self.client.chat.completions.create(**settings)

    def ended(self) -> tuple[int, int]:
        return self.head.wait(60), self.other.wait(60)

    def ranks(self) -> list[int]:
        """Processes of ranks: children of either program, but for those that render templates and read bodies."""
        command = ["pgrep", "-f", "native.workers", "-P"]
        listed = [subprocess.run([*command, str(p.pid)], capture_output=True) for p in (self.head, self.other)]
        return [int(pid) for found in listed for pid in found.stdout.split()]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    both = Nodes()
    yield both
    for process in (both.head, both.other):
        process.kill()
        process.wait(30)


def are_gone(pids: list[int]) -> bool:
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_one_endpoint_stands_before_both_nodes_and_ends_them_in_order(nodes: Nodes) -> None:
    assert httpx.get(f"{nodes.address}/models").status_code == 401
    ranks = nodes.ranks()
    assert len(ranks) == 2
    answers = nodes.ask(n=5)
    assert [choice.message.content for choice in answers.choices] == [ANSWER] * 5
    pieces = [chunk.choices[0].delta.content or "" for chunk in nodes.ask(stream=True)]
    assert "".join(pieces) == ANSWER
    assert len([piece for piece in pieces if piece]) > 1
    nodes.head.send_signal(signal.SIGTERM)
    assert nodes.ended() == (0, 0)
    assert are_gone(ranks)
    assert KEY not in nodes.head.stderr.read() + nodes.other.stderr.read()


def test_a_signal_at_another_node_lets_requests_end_and_is_told_as_a_preemption(nodes: Nodes) -> None:
    stream = nodes.ask(stream=True, n=3)
    first = next(iter(stream))
    nodes.other.send_signal(signal.SIGTERM)
    texts = ["", "", ""]
    for chunk in [first, *stream]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [ANSWER] * 3
    assert nodes.ended() == (75, 75)
    assert "potstill: node 1: stopped by SIGTERM" in nodes.head.stderr.read()


def test_a_rank_that_is_killed_ends_the_server_and_the_other_node(nodes: Nodes) -> None:
    ranks = nodes.ranks()
    failures: list[Exception] = []

    def ask() -> None:
        try:
            nodes.ask(n=64, temperature=1.0, max_tokens=2000)
        except openai.APIError as exc:
            failures.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(1.0)
    os.kill(ranks[1], signal.SIGKILL)
    since = time.monotonic()
    assert nodes.ended() == (3, 3)
    assert time.monotonic() - since < 60
    thread.join(30)
    assert failures
    said = nodes.head.stderr.read().splitlines()[-1]
    assert said.startswith("potstill: node 1: generation worker: ended with status -9")
    assert "ended with status -9" in nodes.other.stderr.read()
    assert are_gone(ranks)


def test_a_first_node_that_is_killed_leaves_nothing_behind(nodes: Nodes) -> None:
    ranks = nodes.ranks()
    nodes.head.kill()
    assert nodes.other.wait(60) == 3
    assert nodes.other.stderr.read().splitlines()[-1].startswith("potstill: ")
    assert are_gone(ranks)


def test_a_node_with_another_key_is_refused_and_the_right_one_joins() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = ["--set", "teacher.num_ranks=2", "--set", "teacher.num_nodes=2", "--set", f"teacher.rpc_port={port}"]
    ranks += ["--set", "teacher.head_address=127.0.0.1"]
    head = [*COMMAND, "serve", PICO, *ranks, "--port", "0"]
    environment = {**ENVIRONMENT, "POTSTILL_API_KEY": KEY}
    with subprocess.Popen(head, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wrong = potstill("serve", PICO, *ranks, "--node-rank", "1", POTSTILL_API_KEY="another")
            assert wrong.returncode == 3
            said = f"potstill: 127.0.0.1:{port}: node 0 has another key in $POTSTILL_API_KEY\n"
            assert wrong.stderr == said
            more = ["--set", "teacher.num_ranks=4"]
            other = potstill("serve", PICO, *ranks, *more, "--node-rank", "1", POTSTILL_API_KEY=KEY)
            assert other.returncode == 2
            assert "num_ranks is 4 there and 2 at node 0" in other.stderr
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130


def test_traces_are_written_over_ranks(tmp_path: Path) -> None:
    count = ["--set", "problems.0.count=6", "--set", "generate.num_samples=2"]
    result = potstill("generate", PICO, *count, "--set", "teacher.num_ranks=2", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    traces = pq.read_table(tmp_path / "pico/generate/traces").to_pylist()
    assert len(traces) == 12
    assert sum(trace["finish_reason"] == "stop" for trace in traces) >= 11
    again = potstill("generate", PICO, *count, "--set", "teacher.num_ranks=2", "--out", tmp_path)
    assert again.returncode == 0
    assert "ranks" not in again.stderr  # nothing is asked again, and nothing started
