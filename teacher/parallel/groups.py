"""Process groups of expert parallelism, and the exchanges over them: gloo on CPUs, NCCL on GPUs.

A rank that dies ends the others. Over gloo the next exchange fails when its connection closes, at the latest after
`timeout_s`, and raises EnvironmentFault. NCCL's watchdog ends the process after `timeout_s` and says so on stderr: a
kernel that waits on a GPU cannot raise.

Shape legend: C rows sent, M rows received, B columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import DataError, EnvironmentFault
from teacher.parallel import turns

LOST_PEERS = "lost its peers"
# torch's switch for ranks that share a GPU; "1" is our word too that they may.
SHARED_GPU_ENV = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `node`: the ranks of its node; `rail`: those with its local index, one a node
    (None where there is one node)."""

    rank: int
    num_ranks: int
    ranks_per_node: int
    device: torch.device
    world: dist.ProcessGroup
    rail: dist.ProcessGroup | None
    node: dist.ProcessGroup


def device_of(rank: int, ranks_per_node: int) -> torch.device:
    """A rank's GPU on its node; the CPU where that has none.

    Ranks that outnumber the GPUs share them, for tests: they store to each other's memory as over NVLink, but a kernel
    that waits for a peer waits for the peer's turn on the GPU, and NCCL goes by sockets.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if (num_gpus := torch.cuda.device_count()) < ranks_per_node:
        # NCCL takes two ranks of one GPU where each says that it is on a host of its own.
        os.environ |= {SHARED_GPU_ENV: "1", "NCCL_HOSTID": str(rank)}
    return torch.device("cuda", rank % ranks_per_node % num_gpus)


@contextmanager
def opened_ranks(
    *,
    rank: int,
    num_ranks: int,
    init_method: str | None = None,
    store: dist.Store | None = None,
    ranks_per_node: int | None = None,
    device: torch.device | str = "cpu",
    timeout_s: float = 30.0,
) -> Iterator[Ranks]:
    """Join the others at `init_method` (torch's: tcp://host:port, file:///path) or in a `store` that somebody keeps;
    leaves them at the end.

    Raises EnvironmentFault where they do not come within `timeout_s`, DataError for nodes that are not whole.
    """
    device = torch.device(device)
    per_node = ranks_per_node or num_ranks
    if num_ranks % per_node:
        raise DataError(f"{num_ranks} ranks are no whole number of nodes with {per_node} ranks each")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=init_method,
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as exc:
        raise EnvironmentFault(f"the {num_ranks} ranks did not meet: {exc}", where=init_method) from exc
    try:
        yield _join_groups(rank, num_ranks, per_node, device)
    finally:
        dist.destroy_process_group()


def _join_groups(rank: int, num_ranks: int, per_node: int, device: torch.device) -> Ranks:
    world = dist.group.WORLD
    assert world is not None
    if per_node == num_ranks:
        return Ranks(rank, num_ranks, per_node, device, world, None, world)
    # Every rank takes part in making every group, in the same order.
    nodes = [dist.new_group(list(range(first, first + per_node))) for first in range(0, num_ranks, per_node)]
    rails = [dist.new_group(list(range(local, num_ranks, per_node))) for local in range(per_node)]
    return Ranks(rank, num_ranks, per_node, device, world, rails[rank % per_node], nodes[rank // per_node])


def exchange(rows_CB: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to the members of `group` in their order, and theirs here, [M, B]. Raises EnvironmentFault for lost ones."""
    received_MB = rows_CB.new_empty(sum(receive), *rows_CB.shape[1:])
    rows_CB = rows_CB.contiguous()
    with lost_peers(group):
        _finish(
            dist.all_to_all_single(
                received_MB, rows_CB, list(receive), list(send), group=group, async_op=turns.are_taken()
            )
        )
    return received_MB


def exchange_evenly(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    """The same for equal parts, into a tensor that is there already: no host synchronisation."""
    with lost_peers(group):
        _finish(dist.all_to_all_single(received, sent, group=group, async_op=turns.are_taken()))


def _finish(work: dist.Work | None) -> None:
    """Wait for an exchange that was begun in turn; without turns torch has waited already."""
    if work is not None:
        turns.pass_on()  # the other computation runs while the rows travel
        work.wait()  # back in turn: what follows may use the rows


def exchange_counts(counts_R: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """(what I send, what I receive) from what each rank sends. The host waits for it."""
    received_R = torch.empty_like(counts_R)
    exchange_evenly(received_R, counts_R, group)
    send, receive = torch.stack((counts_R, received_R)).tolist()
    return send, receive


def reduce_scatter(parts_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group of what each has for this rank: [R, ...] of every rank to [...]."""
    own = torch.empty_like(parts_R[0])
    # torch 2.13 renames both of these and warns of the old names.
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with lost_peers(group):
        collective(own.view(-1), parts_R.contiguous().view(-1), group=group)
    return own


def all_gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of every rank, in their order, as [R, ...] everywhere."""
    parts_R = own.new_empty(group.size(), *own.shape)
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with lost_peers(group):
        collective(parts_R.view(-1), own.contiguous().view(-1), group=group)
    return parts_R


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, in place; returns the tensor."""
    with lost_peers(group):
        dist.all_reduce(tensor, group=group)
    return tensor


@contextmanager
def lost_peers(group: dist.ProcessGroup) -> Iterator[None]:
    """Raise what torch says of an exchange that failed as an EnvironmentFault of one line."""
    try:
        yield
    except RuntimeError as exc:
        first_line = str(exc).splitlines()[0]
        message = f"rank {dist.get_rank()} {LOST_PEERS} in an exchange among {group.size()} ranks: {first_line}"
        raise EnvironmentFault(message) from exc
