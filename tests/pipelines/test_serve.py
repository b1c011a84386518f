"""`potstill serve` as a program: the bundled teacher answers over HTTP, a signal ends it in order."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from tests.lateness import seconds_to_end
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, potstill, without_progress
from tests.repository import REPOSITORY

PICO = "pipelines/recipes/pico.yaml"
QUESTION = "State the final answer to the following arithmetic problem: 12 + 34 - 5 + 20 ="


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "serve", PICO, "--port", "0", "--set", "teacher.prompt_suffix=7 + 7 ="],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait(30)


def test_the_bundled_teacher_answers(server: subprocess.Popen[str]) -> None:
    """Asked what the client sends: the recipe's own instruction is for its own questions."""
    announced = server.stdout.readline()
    assert announced.startswith("serving 'pico' on http://127.0.0.1:"), server.stderr.read()
    body = {"model": "pico", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
    address = announced.split()[-1]
    answer = httpx.post(f"{address}/chat/completions", json=body, timeout=60).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == ("<think>\n12 + 34 = 46\n46 - 5 = 41\n41 + 20 = 61\n</think>\n\n\\boxed{61}")
    assert choice["finish_reason"] == "stop"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REPOSITORY / "teacher/pico")
    prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)
    assert answer["usage"]["prompt_tokens"] == len(prompt["input_ids"])
    with httpx.Client() as idle:
        assert idle.get(f"{address}/models").status_code == 200  # and its connection stays
        assert seconds_to_end(server, signal=signal.SIGTERM) < 1
    assert server.returncode == 0
    assert without_progress(server.stderr.read()) == ""


@pytest.mark.slow
def test_a_teacher_that_speculates_answers_the_same_and_says_how_often_it_was_right() -> None:
    command = [*COMMAND, "serve", PICO, "--port", "0", "--speculate"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[-1]
        body = {"model": "pico", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
        answer = httpx.post(f"{address}/chat/completions", json=body, timeout=60).json()
        process.send_signal(signal.SIGTERM)
        last = process.stdout.read()
        assert process.wait(30) == 0
    content = answer["choices"][0]["message"]["content"]
    assert content == "<think>\n12 + 34 = 46\n46 - 5 = 41\n41 + 20 = 61\n</think>\n\n\\boxed{61}"
    accepted, drafted = (int(number) for number in re.match(r"(\d+) of (\d+) drafted tokens came true", last).groups())
    assert 0.8 * drafted <= accepted <= drafted


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = potstill("serve", PICO, "--port", port)
    assert result.returncode == 3
    assert result.stderr == f"potstill: 127.0.0.1:{port}: cannot be bound (Address already in use)\n"


def test_an_endpoint_cannot_be_served() -> None:
    result = potstill("serve", "pipelines/recipes/r1-openai.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "potstill: pipelines/recipes/r1-openai.yaml: teacher.backend: only a native or a vllm"
    )


def test_an_address_that_others_reach_needs_a_key() -> None:
    result = potstill("serve", PICO, "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 2
    assert result.stderr == "potstill: --host: 0.0.0.0 can be reached from outside: set a key in $POTSTILL_API_KEY\n"


def test_a_bound_that_would_not_hold_is_refused() -> None:
    result = potstill("serve", "pipelines/recipes/r1-node-latency.yaml", "--max-waiting", "5")
    assert (result.returncode, result.stderr) == (2, "potstill: --max-waiting: vLLM's queue has no bound\n")
    result = potstill("serve", "pipelines/recipes/r1-node-latency.yaml", "--speculate")
    assert (result.returncode, result.stderr) == (
        2,
        "potstill: --speculate: vLLM speculates by its own flag, speculative-config\n",
    )


def test_flags_of_a_native_server_are_checked_before_anything_is_loaded() -> None:
    vllm = "pipelines/recipes/r1-node-latency.yaml"
    result = potstill("serve", vllm, "--end-loops")
    said = "potstill: --end-loops: is for a native teacher; vLLM's own flags stand in its recipe\n"
    assert (result.returncode, result.stderr) == (2, said)
    result = potstill("serve", PICO, "--reasoning-parser", "qwen3")
    said = "potstill: --reasoning-parser: 'qwen3' is not known; deepseek_r1 is\n"
    assert (result.returncode, result.stderr) == (2, said)


@pytest.mark.slow
def test_with_a_key_in_the_environment_the_server_asks_for_it() -> None:
    command = [*COMMAND, "serve", PICO, "--port", "0", "--host", "0.0.0.0"]
    environment = {**ENVIRONMENT, "POTSTILL_API_KEY": "sk-canary-0917"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
            assert httpx.get(f"{address}/models").status_code == 401
            answer = httpx.get(f"{address}/models", headers={"authorization": "Bearer sk-canary-0917"})
            assert answer.json()["data"][0]["id"] == "pico"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert "sk-canary" not in process.stderr.read()
        finally:
            process.kill()
