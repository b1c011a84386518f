"""The process groups of a layout, and the device meshes that say where a sharded tensor's parts lie.

Every group has the time-out that the world has: torch's own default for further groups is half an hour, however soon
the world gives up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from teacher.parallel.groups import Ranks, opened_ranks
from teacher.parallel.layout import Coordinates, Layout


@dataclass(frozen=True)
class Meshes:
    """This process in its layout.

    `pipeline`: ranks that differ in the stage alone; `replicas`: those of the stage, (copy, expert rank) in order;
    `copies`: those with the same experts; `experts`: the expert group; `ends`: the pipeline's first and last rank,
    where this is one of them and they are two. `by_replica` is the mesh of `replicas` [dp * ep], `by_expert` that of
    the same ranks as [dp, ep].
    """

    layout: Layout
    rank: int
    at: Coordinates
    device: torch.device
    world: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    replicas: dist.ProcessGroup
    copies: dist.ProcessGroup
    experts: Ranks
    ends: dist.ProcessGroup | None
    by_replica: DeviceMesh
    by_expert: DeviceMesh

    @property
    def replica(self) -> int:
        """Number of this rank among the stage's replicas, and so of the part of the batch that is its own."""
        return self.at.dp * self.layout.ep + self.at.ep


@contextmanager
def opened_meshes(
    layout: Layout, *, rank: int, init_method: str, device: torch.device | str = "cpu"
) -> Iterator[Meshes]:
    """Join the other ranks of `layout` at `init_method` and form its groups; leave them at the end.

    Raises EnvironmentFault where they do not come within the layout's time-out.
    """
    timeout_s = layout.timeout_s
    with opened_ranks(
        rank=rank, num_ranks=layout.num_ranks, init_method=init_method, device=device, timeout_s=timeout_s
    ) as ranks:
        yield form_meshes(layout, ranks)


def form_meshes(layout: Layout, ranks: Ranks) -> Meshes:
    """The layout's groups out of the world of `ranks`. Collective: every rank makes every group, in one order."""
    grid = torch.arange(layout.num_ranks).view(layout.pp, layout.dp, layout.ep)

    def own(lines: torch.Tensor) -> dist.ProcessGroup:
        """Make groups that do not overlap; returns the one with this rank."""
        mine = None
        for members in lines.tolist():
            group = dist.new_group(members, timeout=timedelta(seconds=layout.timeout_s))
            mine = group if ranks.rank in members else mine
        assert mine is not None
        return mine

    pipeline = own(grid.permute(1, 2, 0).flatten(0, 1))
    copies = own(grid.permute(0, 2, 1).flatten(0, 1))
    experts = own(grid.flatten(0, 1))
    replicas = own(grid.flatten(1))
    at = layout.coordinates(ranks.rank)
    ends = None
    if layout.num_stages == layout.pp > 1:  # in a V both ends are on one rank
        pairs = grid[[0, -1]].flatten(1).T.tolist()
        for pair in pairs:
            group = dist.new_group(pair, timeout=timedelta(seconds=layout.timeout_s))
            ends = group if ranks.rank in pair else ends
    kind = ranks.device.type
    return Meshes(
        layout,
        ranks.rank,
        at,
        ranks.device,
        ranks.world,
        pipeline,
        replicas,
        copies,
        Ranks(at.ep, layout.ep, layout.ep, ranks.device, experts, None, experts),
        ends,
        DeviceMesh.from_group(replicas, kind),
        DeviceMesh.from_group([copies, experts], kind, mesh=grid[at.pp], mesh_dim_names=("dp", "ep")),
    )
