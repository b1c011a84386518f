"""One engine made of ranks: each has sequences of its own, their routed experts are shared (data parallel).

    Fleet (this process: HTTP, or the generate stage)
      |-- pipes ------ a rank of this node   (`teacher.backends.native.workers`, `teacher.backends.native.ranks`)
      |-- pipes ------ ...
      `-- connection - another node's `serve_node` -- pipes -- its ranks

A sequence goes to the rank that has fewest. Ranks talk to each other by `torch.distributed`; here they are only told
what to write. A rank that is lost ends all of them, at once, and the fleet says which it was.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill.bundled import locate
from distill.errors import EnvironmentFault, PotstillError, RecipeError, UserInputError
from distill.manifest import hash_file
from distill.progress import Progress, Task, silent
from distill.recipe import SERVER_KEY_ENV, NativeTeacher
from distill.records import content_id
from distill.weights import weight_files
from teacher.backends.native.live import POLL_S, Worker, WorkerEngines
from teacher.backends.native.nodes import Link, Node, Relay, gathered, join
from teacher.backends.native.ranks import RankPlace, check_devices
from teacher.backends.native.workers import EngineSettings, WorkerProcess
from teacher.model.block_checkpoint import read_fp8_config
from teacher.models.load import LATENT, read_facts
from teacher.parallel.groups import LOST_PEERS

# How long a rank that lost its peers waits for the one that was lost to be known.
CAUSE_S = 5.0


class Fleet(WorkerEngines):
    """A `LiveEngine`, with what a backend asks of an `Engine`, once it is ready."""

    speculate = False
    max_positions = 0
    precision = ""

    def __init__(
        self, crew: Many[Worker], nodes: Many[Node], stack: contextlib.ExitStack, settings: EngineSettings
    ) -> None:
        self._nodes = nodes
        self.batch_size = settings.batch_size * len(crew)
        self.eos_token_ids = settings.eos_token_ids
        # Of the last rebalancing: the worst layer's most loaded rank over the mean.
        self.gauges: dict[str, float] = {}
        self._num_moved = 0
        self._ready: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cause_known = threading.Event()
        super().__init__(crew, stack)

    @property
    def fault(self) -> PotstillError | None:
        return super().fault or next((node.leaving for node in self._nodes if node.leaving is not None), None)

    def wait_until_ready(self, task: Task) -> None:
        """All ranks have loaded their weights. Raises what ended one that has not."""
        facts: list[dict[str, Any]] = []
        while len(facts) < len(self._crew):
            with contextlib.suppress(queue.Empty):
                facts.append(self._ready.get(timeout=POLL_S))
                task.advance()
            if self.fault is not None:
                raise self.fault
        self.max_positions = min(fact["max_positions"] for fact in facts)  # a cache may have found less room
        self.precision = facts[0]["precision"]

    def _tell(self, number: int, news: dict[str, Any]) -> None:
        if "ready" in news:
            self._ready.put(news["ready"])
        elif "rebalanced" in news:
            self._num_moved += news["rebalanced"]["num_slots_moved"]
            (_, before), (_, after) = news["rebalanced"]["before"], news["rebalanced"]["after"]
            self.gauges = {
                "expert_imbalance_before": before, "expert_imbalance": after, "experts_moved": self._num_moved
            }  # fmt: skip
        else:
            super()._tell(number, news)

    def _lose(self, fault: PotstillError) -> None:
        if LOST_PEERS in str(fault) and self._cause_known.wait(CAUSE_S):
            return  # whoever knew the cause has ended all
        self._cause_known.set()
        super()._lose(fault)


def open_fleet(settings: EngineSettings, config: NativeTeacher, *, progress: Progress | None = None) -> Fleet:
    """Start this node's ranks, wait for the other nodes' and for all weights.

    Raises RecipeError for ranks that the model cannot be spread over and for several nodes without a key,
    CheckpointError for widths that FP8 does not take, EnvironmentFault for a lack of GPUs, an address that cannot be
    bound, nodes that do not come and ranks that end.
    """
    per_node = _checked(settings.folder, config)
    with (progress or silent()).task("ranks", config.num_ranks, unit="ranks") as task:
        with contextlib.ExitStack() as stack:
            meet, links = _met(settings.folder, config, stack)
            rebalance = None if config.rebalance is None else config.rebalance.model_dump()
            place = RankPlace(0, config.num_ranks, per_node, meet, config.in_halves, config.num_redundant, rebalance)
            settings = replace(settings, place=place)
            nodes = []
            for number, link in sorted(links.items()):
                link.send({"settings": settings.packed()})
                nodes.append(Node(number, link, _ranks_of(number, per_node)))
            crew: list[Worker] = [*_started(settings.packed(), _ranks_of(0, per_node), stack).values()]
            crew += [rank for node in nodes for rank in node.ranks]
            fleet = Fleet(crew, nodes, stack.pop_all(), settings)
        try:
            fleet.wait_until_ready(task)
        except BaseException:
            fleet.abort()
            raise
    return fleet


def serve_node(config: NativeTeacher, number: int, *, base_dir: Path, announce: Callable[[str], object]) -> None:
    """This node's ranks, for the fleet of node 0, until that ends.

    Raises as `open_fleet`, and UserInputError where this node's model or recipe is not that of node 0.
    """
    folder = locate(config.model, base_dir)
    per_node = _checked(folder, config)
    assert config.head_address is not None
    announce(f"node {number}: waiting for node 0 at {config.head_address}:{config.rpc_port}")
    link, settings = join(config.head_address, config.rpc_port, _hello(folder, config, node=number), _key())
    with contextlib.ExitStack() as stack:
        stack.callback(link.close)
        ranks = _ranks_of(number, per_node)
        workers = _started(settings | {"folder": str(folder.resolve())}, ranks, stack)
        announce(f"node {number}: ranks {ranks[0]} to {ranks[-1]} of {config.num_ranks} are starting")
        Relay(link, workers).run()


def _met(folder: Path, config: NativeTeacher, stack: contextlib.ExitStack) -> tuple[str, dict[int, Link]]:
    """`RankPlace.meet`, and the other nodes' connections, once all are there."""
    if config.num_nodes == 1:
        return str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"), {}
    assert config.head_address is not None
    links = {}
    with _listening(config.head_address, config.rpc_port) as listener:
        for number, link in gathered(listener, _hello(folder, config, node=0), config.num_nodes, _key()):
            stack.callback(link.close)
            links[number] = link
    store = dist.TCPStore(config.head_address, 0, is_master=True, wait_for_workers=False)
    stack.callback(lambda held: None, store)  # it serves as long as it is held
    return f"{config.head_address}:{store.port}", links


def _ranks_of(node: int, per_node: int) -> range:
    return range(node * per_node, (node + 1) * per_node)


def _started(settings: dict[str, Any], ranks: range, stack: contextlib.ExitStack) -> dict[int, WorkerProcess]:
    place = settings["place"]
    return {
        rank: stack.enter_context(
            WorkerProcess(json.dumps(settings | {"place": place | {"rank": rank}}), UserInputError)
        )
        for rank in ranks
    }


def _checked(folder: Path, config: NativeTeacher) -> int:
    """Ranks a node."""
    kind = read_facts(folder).model_type
    if kind != LATENT:
        message = f"only {LATENT} models have experts to share over ranks, this is {kind!r}"
        raise RecipeError(message, where="recipe", field="teacher.num_ranks")
    num_slots = read_fp8_config(folder).n_routed_experts + config.num_redundant
    if num_slots % config.num_ranks:
        more = f" and {config.num_redundant} more" if config.num_redundant else ""
        message = f"{num_slots - config.num_redundant} experts{more} do not divide among {config.num_ranks} ranks"
        raise RecipeError(message, where="recipe", field="teacher.num_ranks")
    if config.num_nodes > 1:
        _key()
    per_node = config.num_ranks // config.num_nodes
    check_devices(per_node)
    return per_node


def _key() -> bytes:
    if not (key := os.environ.get(SERVER_KEY_ENV, "")):
        message = f"nodes know each other by a key: set one in ${SERVER_KEY_ENV}"
        raise RecipeError(message, where="recipe", field="teacher.num_nodes")
    return key.encode()


def _hello(folder: Path, config: NativeTeacher, *, node: int) -> dict[str, Any]:
    sizes = [[path.name, path.stat().st_size] for path in weight_files(folder)]
    return {
        "node": node,
        "potstill": importlib.metadata.version("potstill"),
        "model": content_id([hash_file(folder / "config.json"), sizes]),
        "num_ranks": config.num_ranks,
        "num_nodes": config.num_nodes,
    }


@contextlib.contextmanager
def _listening(address: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((address, port))
    except OSError as exc:
        raise EnvironmentFault(f"cannot be bound ({exc.strerror or exc})", where=f"{address}:{port}") from exc
    with listener:
        yield listener
        listener.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
