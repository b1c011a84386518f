"""The Ray backend on two simulated nodes of one machine: a node is killed in the middle of a job, nothing is lost.

Each replica's server is the stand-in for `vllm serve`; a pool's endpoints are real servers on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import EnvironmentFault, RecipeError
from distill.protocols import Teacher
from distill.recipe import RayTeacher
from distill.records import Completion, Problem, Sampling, TraceRequest
from teacher.backends import open_teacher
from teacher.backends.native.opening import open_native
from teacher.backends.ray import RayBackend, Secret
from tests.processes import command_lines
from tests.repository import REPOSITORY
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.vllm.stand_in_vllm import install_stand_in
from tests.teacher.v3_models import tiny_config, write_model_folder

ray = pytest.importorskip("ray", reason="Ray is not installed")
SAMPLING = Sampling(max_tokens=8, seed=2)
CANARY = "sk-canary-2604"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of a head without room and two nodes with room for one replica each; its folder is `world.folder`."""
    folder = tmp_path_factory.mktemp("ray")
    write_model_folder(folder / "model", tiny_config(), fp8=True)
    packages = install_stand_in(folder)
    # Sockets have a path of at most 107 characters: pytest's folders are too deep.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as session:
        patch.syspath_prepend(str(packages))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(REPOSITORY)]))
        patch.setenv("STAND_IN_FOLDER", str(folder))
        patch.setenv("STAND_IN_DELAY_S", "0.1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", session)
        (Path(session) / "ray").mkdir()
        cluster = started_cluster(f"{session}/ray", patch)
        cluster.folder = folder
        cluster.session = Path(session)
        patch.setenv("OPENAI_API_KEY", CANARY)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def started_cluster(session: str, patch: pytest.MonkeyPatch) -> Any:
    """A head and two nodes.

    Ray gives a node's agents 15 seconds to say on which ports they listen, and gives the node up after that; a loaded
    machine takes longer (ray-project/ray 65983). So they are told their ports, and the one that cannot be told is noted
    in their place: the HTTP port of an agent that, without `ray[default]`, serves no HTTP.
    """
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

    start = Node.start_ray_processes

    def start_with_port(node: Node) -> None:
        (Path(node._session_dir) / f"dashboard_agent_listen_port_{node._node_id}").write_text("0")
        start(node)

    patch.setattr(Node, "start_ray_processes", start_with_port)
    head = {"num_cpus": 0, "temp_dir": session, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **node_settings()})
    cluster.victims = [cluster.add_node(num_cpus=1, **node_settings()) for _ in range(2)]
    return cluster


def node_settings() -> dict[str, int]:
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}
    return {**ports, "object_store_memory": 80_000_000}


def requests(count: int, *, index: int = 0) -> list[TraceRequest]:
    problems = [Problem(prompt=f"{n} + {n + 1}?", answer="x", grader="math", source="t") for n in range(count)]
    return [TraceRequest(problem=problem, sample_index=index) for problem in problems]


def lives(folder: Path) -> list[int]:
    return [int(line.split()[0]) for line in (folder / "lives").read_text().splitlines()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_outlives_one_of_its_two_nodes(world: Any) -> None:
    config = {"model": str(world.folder / "model"), "num_replicas": 2, "max_concurrency": 4, "address": world.address}
    teacher = open_teacher(RayTeacher.model_validate(config), base_dir=Path.cwd(), log_dir=world.folder / "logs")
    assert isinstance(teacher, Teacher)
    native = open_native(world.folder / "model", batch_size=1).identity
    assert teacher.identity == native.model_copy(update={"backend": "vllm", "backend_version": "0.31.0"})
    asked = requests(160)
    arrived: list[Completion] = []
    for completion in teacher.generate(asked, SAMPLING):
        arrived.append(completion)
        if world.victims and len(lives(world.folder)) == 2:  # both replicas are up and at work
            world.remove_node(world.victims.pop(), allow_graceful=False)
            left = len(asked) - len(arrived)
            assert left > 50, "the node must die in the middle of the job"
            world.victims.clear()
    assert len(arrived) == len(asked)
    assert {c.request.problem.id for c in arrived} == {r.problem.id for r in asked}
    assert all(c.text == f"<think>\nseed {c.request.seed(SAMPLING)}</think>x" for c in arrived)
    teacher.close()
    # One server stood on the node that died: its keeper sees that when Ray's worker there has seen it.
    deadline = time.monotonic() + 30
    while alive := [pid for pid in lives(world.folder) if running(pid)]:
        assert len(alive) == 1, f"servers outlived their replicas: {alive}"
        assert time.monotonic() < deadline, f"a server outlived its node: {alive}"
        time.sleep(0.1)


def test_the_key_is_in_nothing_that_ray_or_the_servers_wrote(world: Any) -> None:
    """After the job above: the logs of Ray's processes, of the replicas, and every command line."""
    written = [p for folder in (world.session, world.folder) for p in folder.rglob("*") if p.is_file()]
    assert any(path.name == "raylet.out" for path in written)
    assert any(path.name == "vllm.log" for path in written)
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    commands = b"".join(line for _, line in command_lines())
    assert b"raylet" in commands
    assert CANARY.encode() not in commands
    assert CANARY not in repr(Secret(CANARY))


def pool(world: Any, *endpoints: ChatEndpoint, **settings: Any) -> RayBackend:
    urls = [endpoint.url for endpoint in endpoints]
    tree = {"model": "pico", "base_urls": urls, "address": world.address, "max_concurrency": 4, "max_retries": 1}
    teacher = open_teacher(RayTeacher.model_validate(tree | settings), base_dir=Path.cwd())
    assert isinstance(teacher, RayBackend)
    return teacher


class WaitsFor(ChatEndpoint):
    """Answers nothing until the other endpoint has been asked."""

    def __init__(self, other: ChatEndpoint) -> None:
        super().__init__()
        self.other = other

    async def chat(self, request: Any) -> Any:
        while len(self.other.payloads) <= 3:
            await asyncio.sleep(0.02)
        return await super().chat(request)


def test_a_pool_shares_the_work_and_does_without_a_dead_endpoint(world: Any) -> None:
    with serving(ChatEndpoint()) as second, serving(WaitsFor(second)) as first:
        asked = requests(40)
        teacher = pool(world, first, second, max_restarts=1)
        second.fault = lambda number, payload: _refuse() if number > 3 else None
        arrived = list(teacher.generate(asked, SAMPLING))
        teacher.close()
        assert sorted(c.request.problem.id for c in arrived) == sorted(r.problem.id for r in asked)
        assert len(first.payloads) > 20
        assert len(second.payloads) > 3


def test_faults_are_one_line(world: Any) -> None:
    with serving(ChatEndpoint()) as endpoint:
        teacher = pool(world, endpoint, max_restarts=0)
        assert teacher.identity.name == "pico"
        endpoint.fault = lambda number, payload: _refuse()
        with pytest.raises(EnvironmentFault, match=r"/v1: .*HTTP 503"):
            list(teacher.generate(requests(2), SAMPLING))
        teacher.close()
        teacher = pool(world, endpoint, model="pcio")
        with pytest.raises(RecipeError, match="'pcio' is not served"):
            _ = teacher.identity


def _refuse() -> Any:
    from starlette.responses import Response

    return Response("down", 503)


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentFault, match=r"^ray: is not installed: pip install 'potstill\[ray\]'"):
        open_teacher(RayTeacher(model="x", base_urls=("http://127.0.0.1:1/v1",)), base_dir=Path.cwd())
