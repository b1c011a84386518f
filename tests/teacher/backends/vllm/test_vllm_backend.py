"""The backend that starts a server of its own: what is started, what happens when it dies, what is left behind.

The server is a stand-in for `vllm serve` with the same command line; `test_vllm_agreement` runs the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.errors import CheckpointError, EnvironmentFault, RecipeError
from distill.protocols import Teacher
from distill.recipe import VllmTeacher, parse
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends import open_teacher
from teacher.backends.folder import readable_on_cpu
from teacher.backends.native.opening import open_native
from teacher.backends.vllm import server as vllm_server
from teacher.backends.vllm.backend import VllmBackend
from teacher.backends.vllm.routes import AllowList
from tests.processes import command_lines
from tests.repository import REPOSITORY
from tests.teacher.backends.vllm.stand_in_vllm import install_stand_in, write_version
from tests.teacher.v3_models import tiny_config, write_model_folder

SAMPLING = Sampling(max_tokens=8, seed=2)
CANARY = "sk-canary-4711"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package `vllm` of this test: its folder is first on the path, its version 0.31.0."""
    packages = install_stand_in(tmp_path)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("STAND_IN_FOLDER", str(tmp_path))
    monkeypatch.setattr(vllm_server, "GRACE_S", 1.0)
    return packages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_config(), fp8=True)
    return tmp_path / "model"


@contextlib.contextmanager
def backend(folder: Path, environment: dict[str, str] | None = None, **settings: Any) -> Iterator[VllmBackend]:
    settings = {"model": str(folder), "environment": environment or {}, "max_concurrency": 4, **settings}
    teacher = open_teacher(VllmTeacher.model_validate(settings), base_dir=Path.cwd(), log_dir=folder.parent)
    assert isinstance(teacher, VllmBackend)
    try:
        yield teacher
    finally:
        teacher.close()


def requests(count: int) -> list[TraceRequest]:
    problems = [Problem(prompt=f"{n}?", answer="x", grader="math", source="t") for n in range(count)]
    return [TraceRequest(problem=problem, sample_index=index) for problem in problems for index in range(2)]


def check_all(completions: list[Completion], asked: list[TraceRequest]) -> None:
    assert sorted(c.text for c in completions) == sorted(f"<think>\nseed {r.seed(SAMPLING)}</think>x" for r in asked)
    assert all(f"seed {c.request.seed(SAMPLING)}<" in c.text for c in completions)


def lives(folder: Path) -> list[tuple[int, list[str]]]:
    """Process id and arguments of every life of the server."""
    path = folder.parent / "lives"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), json.loads(arguments)) for pid, _, arguments in (line.partition(" ") for line in lines)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_server_is_started_with_the_first_sample_and_ends_with_the_teacher(stand_in: Path, folder: Path) -> None:
    asked = requests(6)
    with backend(folder) as teacher:
        assert isinstance(teacher, Teacher)
        assert list(teacher.generate([], SAMPLING)) == []
        assert lives(folder) == []
        check_all(list(teacher.generate(asked[:4], SAMPLING)), asked[:4])
        check_all(list(teacher.generate(asked, SAMPLING)), asked)
        ((pid, _),) = lives(folder)
        assert running(pid)
    assert not running(pid)
    assert "life 1: completion 1" in (folder.parent / "vllm.log").read_text()


def test_identity_is_the_native_one_but_for_the_engine(stand_in: Path, folder: Path) -> None:
    with backend(folder) as teacher, backend(folder, flags={"kv-cache-dtype": "fp8"}) as other:
        ours = open_native(folder, batch_size=1).identity
        assert teacher.identity == ours.model_copy(update={"backend": "vllm", "backend_version": "0.31.0"})
        assert other.identity.backend_version != "0.31.0"
        assert other.identity.backend_version.startswith("0.31.0 ")
    with backend(folder, flags={"max-num-seqs": 3}, max_restarts=1) as same:
        assert same.identity == teacher.identity
    with backend(folder, system_prompt="Think.") as prompted:
        assert prompted.identity.template != teacher.identity.template


def test_a_server_that_dies_is_started_again_and_no_sample_is_lost(stand_in: Path, folder: Path) -> None:
    asked = requests(12)
    with backend(folder, {"STAND_IN_DIES_AFTER": "7", "STAND_IN_LIVES": "3"}) as teacher:
        check_all(list(teacher.generate(asked, SAMPLING)), asked)
    assert len(lives(folder)) == 3


def test_restarts_are_counted_and_end_in_one_line(
    stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    arrived: list[Completion] = []

    def collect(teacher: VllmBackend) -> None:
        for completion in teacher.generate(requests(12), SAMPLING):
            arrived.append(completion)

    with (
        backend(folder, {"STAND_IN_DIES_AFTER": "7"}, max_restarts=1, max_concurrency=1) as teacher,
        pytest.raises(EnvironmentFault) as caught,
    ):
        collect(teacher)
    message = r"vllm.log: vLLM ended with status 3 and was started again 1 times already: RuntimeError: engine died"
    caught.match(message)
    assert len(arrived) == 12
    assert CANARY not in str(caught.value)
    assert "the key was ***" in str(caught.value)
    assert len(lives(folder)) == 2


def test_a_server_that_falls_silent_is_replaced(stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "WATCH_EVERY_S", 0.1)
    monkeypatch.setattr(vllm_server, "WATCH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(vllm_server, "MAX_SILENCE_S", 1.5)
    asked = requests(8)
    with backend(folder, {"STAND_IN_HANGS": "1"}) as teacher:
        check_all(list(teacher.generate(asked, SAMPLING)), asked)
    assert len(lives(folder)) == 2
    assert not any(running(pid) for pid, _ in lives(folder))


def test_a_start_that_fails_says_why_and_leaves_nothing(stand_in: Path, folder: Path) -> None:
    with (
        backend(folder, flags={"nonsense": True}) as teacher,
        pytest.raises(EnvironmentFault, match=r"while it started: vllm: error: unrecognized arguments: --nonsense"),
    ):
        list(teacher.generate(requests(1), SAMPLING))
    with (
        backend(folder, {"STAND_IN_SLOW": "1"}, startup_timeout_s=3) as teacher,
        pytest.raises(EnvironmentFault, match=r"was not up after 3 s \(teacher\.startup_timeout_s\)"),
    ):
        list(teacher.generate(requests(1), SAMPLING))
    assert not any(running(pid) for pid, _ in lives(folder))


def test_a_vllm_that_is_missing_or_too_old_is_one_line(
    stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(stand_in, "0.21.3")
    with pytest.raises(EnvironmentFault, match=r"^vllm: 0\.21\.3 is too old: potstill needs 0\.22\.0 or later$"):
        open_teacher(VllmTeacher(model=str(folder)), base_dir=Path.cwd())
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(EnvironmentFault, match=r"^vllm: is not installed: `make setup-vllm`"):
        open_teacher(VllmTeacher(model=str(folder)), base_dir=Path.cwd())


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(stand_in: Path, folder: Path) -> None:
    for model in (folder.parent / "modle", "model/modle", "./modle"):
        with pytest.raises(CheckpointError, match=r"modle: teacher\.model: no such checkpoint folder"):
            open_teacher(VllmTeacher(model=str(model)), base_dir=folder.parent)


def test_flags_that_are_ours_to_set_are_refused() -> None:
    tree = {"model": "x", "flags": {"api-key": "abc"}}
    with pytest.raises(RecipeError, match=r"^r\.yaml: flags: 'api-key' is set by potstill"):
        parse(VllmTeacher, tree, where="r.yaml")
    with pytest.raises(RecipeError, match=r"flags: '--seed' is not a flag's name"):
        parse(VllmTeacher, {"model": "x", "flags": {"--seed": 1}}, where="r.yaml")


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/health", None, 200),
        ("/v1/chat/completions", None, 200),  # vLLM's own check of the key comes behind this one
        ("/v1/responses", CANARY, 404),
        ("/metrics", CANARY, 404),
        ("//health", CANARY, 404),
        ("/tokenize", None, 404),
        ("/tokenize", "another", 404),
        ("/tokenize", CANARY, 200),
    ],
)
def test_routes_are_an_allow_list(path: str, key: str | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", CANARY)

    async def everything(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> int:
        transport = httpx.ASGITransport(app=AllowList(everything))
        async with httpx.AsyncClient(transport=transport) as client:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return (
                await client.get(httpx.URL("http://x").copy_with(raw_path=path.encode()), headers=headers)
            ).status_code

    assert asyncio.run(ask()) == status


# --- what is left behind ----------------------------------------------------------------------------------------------

OWNER = """
    import sys, time
    from pathlib import Path
    from distill.recipe import VllmTeacher
    from distill.records import Problem, Sampling, TraceRequest
    from teacher.backends import open_teacher
    from teacher.backends.vllm import server as vllm_server

    vllm_server.GRACE_S = 1.0
    teacher = open_teacher(VllmTeacher(model=sys.argv[1]), base_dir=Path.cwd(), log_dir=Path(sys.argv[1]).parent)
    request = TraceRequest(problem=Problem(prompt="?", answer="x", grader="math", source="t"), sample_index=0)
    list(teacher.generate([request], Sampling()))
    print("up", flush=True)
    if sys.argv[2] != "exit":
        time.sleep(600)
"""


@pytest.mark.parametrize("death", ["SIGKILL", "exit"])
def test_nothing_outlives_its_owner(stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, death: str) -> None:
    """Not the keeper, not the server, not what the server started in a session of its own and deaf to SIGTERM."""
    daughter = folder.parent / "daughter"
    monkeypatch.setenv("STAND_IN_DAUGHTER", str(daughter))
    monkeypatch.setenv("PYTHONPATH", f"{stand_in}{os.pathsep}{REPOSITORY}")
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), str(folder), death], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    ((server, _),) = lives(folder)
    keeper = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
    pids = [keeper, server, int(daughter.read_text())]
    if death != "exit":
        owner.send_signal(signal.Signals[death])
    owner.wait(60)
    wait_for(lambda: not any(map(running, pids)), "processes were left behind")


def test_a_killed_keeper_takes_the_server_with_it(stand_in: Path, folder: Path) -> None:
    asked = requests(4)
    with backend(folder) as teacher:
        list(teacher.generate(asked[:1], SAMPLING))
        ((server, _),) = lives(folder)
        os.kill(int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
        wait_for(lambda: not running(server), "the server outlived its keeper")
        check_all(list(teacher.generate(asked, SAMPLING)), asked)
    assert len(lives(folder)) == 2


def test_the_key_is_in_no_process_list_and_no_log(
    stand_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with backend(folder) as teacher:
        completions = list(teacher.generate(requests(2), SAMPLING))
        commands = [line for _, line in command_lines()]
        assert any(b"stand_in" in command or b"vllm.entrypoints" in command for command in commands)
        assert not any(CANARY.encode() in command for command in commands)
        ((_, arguments),) = lives(folder)
        assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
        assert CANARY not in repr(teacher.identity) + repr(completions) + repr(teacher.config)
    assert CANARY not in (folder.parent / "vllm.log").read_text()


# --- the copy for the CPU build ---------------------------------------------------------------------------------------


def test_a_bf16_copy_is_made_once_a_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    write_model_folder(tmp_path / "model", tiny_config(**sizes), fp8=True)
    copy = readable_on_cpu(tmp_path / "model")
    written = (copy / "model.safetensors").stat().st_mtime_ns
    assert copy.name == "model"
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    assert readable_on_cpu(tmp_path / "model") == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert readable_on_cpu(copy) == copy
    write_model_folder(tmp_path / "model", tiny_config(**sizes), fp8=True, std=0.3)
    assert readable_on_cpu(tmp_path / "model") != copy


def test_sizes_that_the_cpu_build_cannot_serve_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: kv_lora_rank: vLLM's CPU build takes 512 alone"):
        readable_on_cpu(folder)
