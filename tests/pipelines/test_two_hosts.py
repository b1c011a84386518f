"""A teacher over two hosts, network namespaces with a cable between them, and the cable is pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT
from tests.repository import REPOSITORY

ADDRESSES = ("10.77.31.1", "10.77.31.2")
RANKS = {"num_ranks": 2, "num_nodes": 2, "head_address": ADDRESSES[0]}
SERVE = [*COMMAND, "serve", "pipelines/recipes/pico.yaml"]
SERVE += [part for name, value in RANKS.items() for part in ("--set", f"teacher.{name}={value}")]
QUESTION = "State the final answer to the following arithmetic problem: 12 + 34 - 5 + 20 ="
ASK = f"""
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="k", max_retries=0)
message = {{"role": "user", "content": {QUESTION!r}}}
answers = client.chat.completions.create(model="pico", messages=[message], temperature=0, n=2)
print([choice.message.content.endswith("{{61}}") for choice in answers.choices])
"""


def ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    names = (f"potstill-a{os.getpid()}", f"potstill-b{os.getpid()}")
    commands = [["netns", "add", name] for name in names]
    commands += [["-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1]]]
    for name, address in zip(names, ADDRESSES, strict=True):
        commands += [["-n", name, "addr", "add", f"{address}/24", "dev", "cable"]]
        commands += [["-n", name, "link", "set", link, "up"] for link in ("lo", "cable")]
    try:
        if shutil.which("ip") is None or any(ip(*command) for command in commands):
            pytest.skip("network namespaces cannot be made here")
        yield names
    finally:
        for name in names if shutil.which("ip") else ():
            ip("netns", "delete", name)


def on(host: str, command: list[str], **options: Any) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, "POTSTILL_API_KEY": "k"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command], cwd=REPOSITORY, env=environment, text=True, **pipes, **options
    )


@pytest.mark.slow
def test_both_hosts_answer_and_neither_waits_for_one_that_is_not_reached(
    hosts: tuple[str, str],
) -> None:
    pytest.importorskip("openai", reason="the openai package comes with vLLM")
    other, head = on(hosts[1], [*SERVE, "--node-rank", "1"]), on(hosts[0], SERVE)
    try:
        assert head.stdout.readline().startswith("serving 'pico'"), head.stderr.read() + other.stderr.read()
        asked = on(hosts[0], [COMMAND[0], "-c", ASK])
        assert asked.communicate(timeout=100)[0] == "[True, True]\n"
        assert ip("-n", hosts[0], "link", "set", "cable", "down") == 0
        since = time.monotonic()
        assert (head.wait(60), other.wait(60)) == (3, 3)
        assert time.monotonic() - since < 60
        assert head.stderr.read().splitlines()[-1] == "potstill: node 1: its connection has ended"
        assert other.stderr.read().splitlines()[-1] == "potstill: node 0 has ended, or is not reached any more"
    finally:
        for process in (head, other):
            process.kill()
            process.wait(30)
