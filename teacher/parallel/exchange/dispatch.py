"""Tokens to the ranks of their experts and the sums back: the high-throughput form, with gradients.

Counts first, then rows: two exchanges a hop, and the host waits for the counts. Nothing is dropped, whatever the
routing. For training; serving has `teacher.parallel.exchange.fixed_places`.

`dispatch` and `combine` are each other's transpose, so each one's backward is the other's way: the gradient of combine
goes out as tokens do (in the form `wire.out`), that of dispatch comes back as sums do (`wire.back`). Gradients pass
straight through FP8. Both are collective in both directions: every rank calls them, those without tokens too.

Shape legend: N tokens here, D hidden, K experts per token, M rows received, C copies sent, S slots, B bytes a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from teacher.parallel.exchange import copies, wire
from teacher.parallel.exchange.wire import Wire
from teacher.parallel.groups import Ranks, exchange, exchange_counts
from teacher.parallel.placement.placement import Placement


class Hop(NamedTuple):
    """Among which ranks, and which slots lie where among them."""

    group: dist.ProcessGroup
    destination_of_slot_S1: Tensor


class HopHandle(NamedTuple):
    """One hop as it was made: what the way back needs."""

    group: dist.ProcessGroup
    sources_C: Tensor
    places_NK: Tensor
    send: list[int]
    receive: list[int]


class DispatchOutput(NamedTuple):
    """Arrived tokens: rows, local slots (int64, -1: another rank's), weights FP32; rows and weights carry gradients."""

    x_MD: Tensor
    slots_MK: Tensor
    weights_MK: Tensor
    handles: tuple[HopHandle, ...]


class Exchange:
    """Dispatch and combine between the ranks of a placement, directly or over two hops.

    Raises ValueError where placement and ranks differ.
    """

    def __init__(self, ranks: Ranks, placement: Placement, *, wire: Wire | None = None, two_hops: bool = False) -> None:
        if (placement.num_ranks, placement.ranks_per_node) != (ranks.num_ranks, ranks.ranks_per_node):
            raise ValueError(
                f"the placement is for {placement.num_ranks} ranks in nodes of {placement.ranks_per_node}, "
                f"these are {ranks.num_ranks} in nodes of {ranks.ranks_per_node}"
            )
        self.ranks, self.placement = ranks, placement
        self.wire, self.two_hops = wire or Wire(), two_hops
        self._tables = placement.tables(ranks.device)
        hops = [Hop(ranks.world, copies.direct(placement))]
        if two_hops and ranks.rail is not None:  # on a single node the second hop is all there is
            within = Hop(ranks.node, copies.within_node(placement, ranks.rank))
            hops = [Hop(ranks.rail, copies.to_nodes(placement)), within]
        self.hops = [Hop(group, table.to(ranks.device)) for group, table in hops]

    def dispatch(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> DispatchOutput:
        """Rows for this rank's experts. Raises EnvironmentFault where ranks are lost, ValueError for widths that the
        form does not take (`wire.layout`)."""
        slots_NK = self._tables.choose(indices_NK, rank=self.ranks.rank)
        handles: list[HopHandle] = []
        x_MD, weights_MK, slots_MK = _Dispatch.apply(x_ND, weights_NK, slots_NK, self.hops, self.wire, handles)
        local_MK = copies.local_slots(slots_MK, self.placement.slots_per_rank, self.ranks.rank)
        return DispatchOutput(x_MD, local_MK, weights_MK, tuple(handles))

    def combine(self, out_MD: Tensor, dispatched: DispatchOutput) -> Tensor:
        """The sums of what the ranks made of each token, [N, D] in the dtype of `out_MD`."""
        return _Combine.apply(out_MD, dispatched.handles, self.wire)


def _make_hop(hop: Hop, slots_NK: Tensor) -> HopHandle:
    # Counts first: the host waits for them, since they are the shapes of what follows.
    to_send = copies.find_copies(slots_NK, hop.destination_of_slot_S1, hop.group.size())
    send, receive = exchange_counts(to_send.counts_R, hop.group)
    return HopHandle(hop.group, to_send.sources(sum(send)), to_send.places_NK, send, receive)


def _out(rows_NB: Tensor, hop: HopHandle) -> Tensor:
    return exchange(wire.gather(rows_NB, hop.sources_C), hop.send, hop.receive, hop.group)


def _back(rows_MD: Tensor, handles: tuple[HopHandle, ...], dtype: torch.dtype) -> Tensor:
    """Sums along the hops in reverse, FP32; rounded to `dtype` wherever they travel."""
    for hop in reversed(handles):
        returned_CD = exchange(rows_MD.to(dtype), hop.receive, hop.send, hop.group)
        rows_MD = copies.summed(returned_CD, hop.places_NK)
    return rows_MD


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        slots_NK: Tensor,
        hops: list[Hop],
        form: Wire,
        handles: list[HopHandle],
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = wire.layout(x_ND.shape[1], slots_NK.shape[1], form.out)
        rows = wire.pack(x_ND, slots_NK, weights_NK, parts)
        slots = slots_NK
        # The second hop forwards whole rows: the slots in them say where each goes on to.
        for hop in hops:
            handles.append(_make_hop(hop, slots))
            rows = _out(rows, handles[-1])
            slots = wire.addresses(rows, parts)[0].long()
        ctx.handles, ctx.form, ctx.dtypes = tuple(handles), form, (x_ND.dtype, weights_NK.dtype)
        ctx.mark_non_differentiable(slots)
        return wire.numbers(rows, parts, x_ND.dtype), wire.addresses(rows, parts)[1].clone(), slots

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor, grad_weights_MK: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_ND = _back(grad_MD, ctx.handles, wire.DTYPES[ctx.form.back])
        grad_weights_NK = _back(grad_weights_MK, ctx.handles, torch.float32)
        return grad_ND.to(ctx.dtypes[0]), grad_weights_NK.to(ctx.dtypes[1]), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, handles: tuple[HopHandle, ...], form: Wire) -> Tensor:
        ctx.handles, ctx.form = handles, form
        return _back(out_MD, handles, wire.DTYPES[form.back]).to(out_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        # The way is known: rows carry numbers and scales alone.
        parts = wire.layout(grad_ND.shape[1], 0, ctx.form.out)
        rows = wire.pack_numbers(grad_ND, parts)
        for hop in ctx.handles:
            rows = _out(rows, hop)
        return wire.numbers(rows, parts, grad_ND.dtype), None, None
