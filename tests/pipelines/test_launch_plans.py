"""`potstill serve` on a vLLM teacher: the commands that it prints, and the server that it runs in the foreground."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from teacher.backends.vllm.launch import parse_help
from tests.lateness import seconds_to_end
from tests.pipelines.tiny_world import COMMAND, ENVIRONMENT, potstill, write_yaml
from tests.repository import REPOSITORY
from tests.teacher.backends.vllm.stand_in_vllm import install_stand_in
from tests.teacher.v3_models import tiny_config, write_model_folder

PLANS = {"r1-node-latency": 1, "r1-node-throughput": 1, "r1-two-nodes": 2, "r1-four-nodes": 4}
CANARY = "sk-canary-1337"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# vLLM's own parser reads each printed command; what it understood comes back.
PARSE = """
import json, shlex, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

for line in sys.stdin:
    words = shlex.split(line)
    parsed = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(words[words.index("serve") + 1:]))
    print(json.dumps({name: parsed[name] for name in sys.argv[1:]}, default=str))
"""


def recipe(name: str) -> str:
    return f"pipelines/recipes/{name}.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the first command keeps vLLM's flags for the others."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plans(cache: str) -> dict[str, list[str]]:
    printed = {}
    for name, num_nodes in PLANS.items():
        result = potstill("serve", recipe(name), "--dry-run", POTSTILL_CACHE=cache, OPENAI_API_KEY=CANARY)
        assert (result.returncode, result.stderr) == (0, "")
        assert CANARY not in result.stdout
        printed[name] = result.stdout.splitlines()
        assert len(printed[name]) == num_nodes
    return printed


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
def test_vllm_itself_takes_every_printed_command(plans: dict[str, list[str]]) -> None:
    wanted = ("model_tag", "tensor_parallel_size", "data_parallel_size", "data_parallel_size_local", "headless")
    wanted += ("data_parallel_start_rank", "data_parallel_address", "enable_expert_parallel", "speculative_config")
    wanted += ("kv_cache_dtype", "host", "api_key", "middleware", "served_model_name", "all2all_backend")
    lines = [line for name in PLANS for line in plans[name]]
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE, *wanted],
        input="\n".join(lines),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    commands = [json.loads(line) for line in parsed.stdout.splitlines() if line.startswith("{")]
    latency, throughput, *nodes = commands
    assert all(c["model_tag"] == "deepseek-ai/DeepSeek-R1" and c["api_key"] is None for c in commands)
    assert all(c["enable_expert_parallel"] for c in commands)
    assert (latency["tensor_parallel_size"], throughput["data_parallel_size"]) == (8, 8)
    assert latency["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 1}
    assert [c["data_parallel_size"] for c in nodes] == [16] * 2 + [32] * 4
    assert [c["data_parallel_start_rank"] for c in nodes] == [None, 8, None, 8, 16, 24]
    assert [c["headless"] for c in nodes] == [False, True, False, True, True, True]
    for c in nodes:
        assert (c["data_parallel_size_local"], c["data_parallel_address"]) == (8, "10.0.0.1")
        assert (c["kv_cache_dtype"], c["all2all_backend"]) == ("fp8", "deepep_high_throughput")
        assert c["speculative_config"]["method"] == "mtp"
    for c in (latency, throughput, nodes[0], nodes[2]):
        assert c["host"] == "127.0.0.1"
        assert c["middleware"] == ["teacher.backends.vllm.routes.AllowList"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
def test_commands_are_for_a_shell_and_name_the_key(plans: dict[str, list[str]]) -> None:
    head, other = plans["r1-two-nodes"]
    assert 'VLLM_API_KEY="$OPENAI_API_KEY" vllm serve' in head
    assert "VLLM_API_KEY" not in other
    for line in (head, other):
        assert "VLLM_NO_USAGE_STATS=1" in shlex.split(line)
        assert "GLOO_SOCKET_IFNAME=eth0" in shlex.split(line)
    # A shell hands the JSON over in one piece.
    words = subprocess.run(
        ["bash", "-c", head.replace("vllm serve", "printf '%s\\n'")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert json.loads(words[words.index("--speculative-config") + 1])["num_speculative_tokens"] == 1


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.flags.enable-expert-paralel=true", "has no flag --enable-expert-paralel; did you mean"),
        ("teacher.flags.kv-cache-dtype=fp7", "takes for --kv-cache-dtype one of auto, "),
    ],
)
def test_what_this_vllm_does_not_know_is_one_line(cache: str, override: str, message: str) -> None:
    path = recipe("r1-two-nodes")
    result = potstill("serve", path, "--dry-run", "--set", override, POTSTILL_CACHE=cache)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"potstill: {path}: teacher.flags: vLLM 0.")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pico", "--dry-run"), "teacher.backend: only a vllm teacher has a launch plan"),
        (("pico", "--node-rank", "1"), "--node-rank: the plan has nodes 0 to 0, got 1"),
        (
            ("r1-two-nodes", "--set", "teacher.num_nodes=3"),
            "flags.data-parallel-size must be a multiple of num_nodes 3",
        ),
        (("r1-two-nodes", "--set", "teacher.flags.host=0.0.0.0"), "'host' is set by potstill"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = potstill("serve", recipe(arguments[0]), *arguments[1:])
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_flags_are_read_from_the_help() -> None:
    text = (
        "usage: vllm serve [--not-this]\n\n"
        "  --headless            Run in headless mode. See --data-parallel-size too.\n"
        "  --enable-x, --no-enable-x, -x\n"
        "                        --not-that either\n"
        "  --kind {a,b}, -k {a,b}\n"
        "  --parser {a,b} or another name\n"
    )
    choices = {"headless": (), "enable-x": (), "no-enable-x": (), "kind": ("a", "b"), "parser": ()}
    assert parse_help(text) == choices


# --- in the foreground ------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A recipe whose teacher the stand-in for vLLM serves, and the environment to start it in."""
    write_model_folder(tmp_path / "model", tiny_config(), fp8=True)
    tree = {
        "extends": str(REPOSITORY / recipe("tiny")),
        "name": "served",
        "teacher": {"backend": "vllm", "model": str(tmp_path / "model"), "max_restarts": 1},
    }
    packages = install_stand_in(tmp_path)
    path = os.pathsep.join([str(packages), ENVIRONMENT["PYTHONPATH"]])
    return write_yaml(tmp_path / "recipe.yaml", tree), {"PYTHONPATH": path, "STAND_IN_FOLDER": str(tmp_path)}


def test_a_vllm_server_runs_in_the_foreground_until_a_signal(world: tuple[Path, dict[str, str]]) -> None:
    path, environment = world
    environment |= {"OPENAI_API_KEY": CANARY, "STAND_IN_DIES_AFTER": "1", "STAND_IN_LIVES": "2"}
    server = subprocess.Popen(
        [*COMMAND, "serve", str(path), "--port", "0"],
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        announced = server.stdout.readline()
        assert announced.startswith("serving 'model' on http://127.0.0.1:"), server.stderr.read()
        url = announced.split()[-1]
        key = {"Authorization": f"Bearer {CANARY}"}
        body = {"messages": [], "seed": 1}
        assert httpx.get(f"{url}/models").status_code == 401
        with pytest.raises(httpx.TransportError):  # it dies with its first completion, and is started again
            httpx.post(f"{url}/chat/completions", json=body, headers=key)
        lines = iter(server.stdout.readline, "")
        assert next(line for line in lines if line.startswith("serving")) == announced
        assert httpx.post(f"{url}/chat/completions", json=body, headers=key).status_code == 200
        assert seconds_to_end(server, signal=signal.SIGTERM) < 1
        assert server.returncode == 0
        assert CANARY not in server.stderr.read()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/models")
    finally:
        server.kill()
        server.wait(30)


def test_outside_addresses_need_a_key_and_nodes_exist(world: tuple[Path, dict[str, str]]) -> None:
    path, environment = world
    result = potstill("serve", path, "--host", "0.0.0.0", **environment, OPENAI_API_KEY="")
    assert result.returncode == 2
    assert result.stderr == "potstill: --host: 0.0.0.0 can be reached from outside: set a key in $OPENAI_API_KEY\n"
    result = potstill("serve", path, "--node-rank", "1", **environment)
    assert result.returncode == 2
    assert result.stderr == "potstill: --node-rank: the plan has nodes 0 to 0, got 1\n"
