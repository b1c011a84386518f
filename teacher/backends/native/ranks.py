"""The engine of one rank among others that share the routed experts (`teacher.parallel.serving`), in a process."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.errors import EnvironmentFault
from teacher.engine.detokenizer import Decode
from teacher.engine.engine import Engine, default_step_tokens
from teacher.parallel.groups import SHARED_GPU_ENV, device_of, opened_ranks
from teacher.parallel.placement.rebalance import Rebalancing, Report
from teacher.parallel.serving import RanksInStep, load_spread

# Ranks read weights for as long as it takes; one that is lost shows when its connections close.
MEET_S = 3600.0
_SIOCGIFADDR = 0x8915  # netdevice(7)


@dataclass(frozen=True)
class RankPlace:
    """A rank among the others, and where they meet: a file of the node that they share, or `host:port` of a store."""

    rank: int
    num_ranks: int
    ranks_per_node: int
    meet: str
    in_halves: bool = False
    num_redundant: int = 0
    rebalance: dict[str, Any] | None = None  # `Rebalancing`


def check_devices(ranks_per_node: int) -> None:
    """Raises EnvironmentFault where this node has GPUs, and fewer than ranks, unless these may share them."""
    if 0 < (count := torch.cuda.device_count()) < ranks_per_node and os.environ.get(SHARED_GPU_ENV) != "1":
        raise EnvironmentFault(f"{ranks_per_node} ranks of this node need a GPU each, it has {count}", where="cuda")


@contextmanager
def engine_of_rank(
    folder: Path,
    place: RankPlace,
    *,
    batch_size: int,
    eos_token_ids: Iterable[int],
    decode: Decode | None,
    on_report: Callable[[Report], object],
) -> Iterator[tuple[Engine, RanksInStep]]:
    """Collective. The first rank's `on_report` hears of every rebalancing. Raises as `opened_ranks` and `load_spread`
    do."""
    device = device_of(place.rank, place.ranks_per_node)
    among: dict[str, Any] = {"rank": place.rank, "num_ranks": place.num_ranks, "ranks_per_node": place.ranks_per_node}
    if place.num_ranks > place.ranks_per_node:
        host, _, port = place.meet.rpartition(":")
        # Gloo would take the address of the host's name, which on many machines is a loopback one.
        if (interface := _interface_to(host)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        among["store"] = dist.TCPStore(host, int(port), is_master=False)
    else:
        among["init_method"] = f"file://{place.meet}"
    with opened_ranks(**among, device=device, timeout_s=MEET_S) as ranks:
        step_tokens = max(default_step_tokens(device), batch_size)
        sizes = {"batch_size": batch_size, "max_step_tokens": step_tokens}
        model, lockstep = load_spread(
            folder, ranks, **sizes, num_redundant=place.num_redundant, in_halves=place.in_halves,
            rebalancing=None if place.rebalance is None else Rebalancing(**place.rebalance),
        )  # fmt: skip
        if lockstep.balancer is not None and place.rank == 0:
            lockstep.balancer.on_report = on_report
        yield Engine(model, **sizes, eos_token_ids=eos_token_ids, decode=decode, lockstep=lockstep), lockstep


def _interface_to(host: str) -> str | None:
    """The network interface that packets to `host` leave by; None where none has their address (IPv6, say)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if request[20:24] == own:
                return name
    return None
