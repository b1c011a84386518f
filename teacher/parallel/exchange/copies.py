"""The dispatch plan: which of its tokens a rank sends where, and how they come back. Pure functions of the routing.

A token travels once to a destination however many of its experts live there (rank de-duplication), and one row comes
back for it: the destination's share of the weighted sum. What travels with it are its K slots and weights, so that the
receiver knows its own part without another exchange.

Two ways to a rank. Direct: the destinations are ranks. Two hops, as in DeepSeek-V3 (arXiv 2412.19437 s.3.2.2): first
one copy a node over InfiniBand, to the rank with the sender's own local index there, which forwards it over NVLink to
the ranks of its node that hold one of its experts; the sum returns the same way and is added up on the way. A hop is
the same function either time (`find_copies`); only the map from slots to destinations differs (`direct`, `to_nodes`,
`within_node`). With routing limited to M nodes, at most M copies of a token cross nodes.

A slot of -1 is a choice that is served elsewhere. Shapes are static but for `sources`.

Shape legend: N tokens, K experts per token, S slots, R destinations of a hop, C copies sent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.parallel.placement.placement import Placement

NOWHERE = -1


class Copies(NamedTuple):
    """int64. Copies lie in the order of their destinations, and of the tokens within one.

    `places_NK`: the place of the copy that choice k of token n calls for, -1 where an earlier choice's copy serves it
    too (or where it goes nowhere). `order` begins with the (token, choice) pairs of the copies. `counts_R`: copies a
    destination.
    """

    places_NK: Tensor
    order: Tensor
    counts_R: Tensor

    def sources(self, num_copies: int) -> Tensor:
        """The token of each copy [C]; `num_copies` is the sum of `counts_R`, which the host must know."""
        return self.order[:num_copies] // self.places_NK.shape[1]


def destinations(slots_NK: Tensor, destination_of_slot_S1: Tensor) -> Tensor:
    """[N, K]; the table's last entry is that of slot -1."""
    return destination_of_slot_S1[slots_NK]


def find_copies(slots_NK: Tensor, destination_of_slot_S1: Tensor, num_destinations: int) -> Copies:
    """The copies that one rank sends in one hop. No host synchronisation.

    >>> table = torch.tensor([0, 0, 1, 1, -1])                  # slots 0 and 1 on rank 0, 2 and 3 on rank 1
    >>> find_copies(torch.tensor([[0, 1], [3, 1]]), table, 2).counts_R.tolist()
    [2, 1]
    """
    num_tokens, per_token = slots_NK.shape
    where_NK = destinations(slots_NK, destination_of_slot_S1)
    # One copy a destination: a choice whose destination an earlier one has too needs none of its own.
    same_NKK = where_NK.unsqueeze(2) == where_NK.unsqueeze(1)
    first_NK = ~torch.tril(same_NKK, diagonal=-1).any(dim=2) & (where_NK != NOWHERE)
    key = torch.where(first_NK, where_NK, num_destinations).flatten()
    sorted_key, order = key.sort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    places_NK = torch.where(first_NK, rank.view(num_tokens, per_token), NOWHERE)
    bounds = torch.searchsorted(sorted_key, torch.arange(num_destinations + 1, device=key.device))
    return Copies(places_NK, order, bounds.diff())


def direct(placement: Placement) -> Tensor:
    """Slot to rank, int64 [S + 1]."""
    return _table([slot // placement.slots_per_rank for slot in range(placement.num_slots)])


def to_nodes(placement: Placement) -> Tensor:
    """Slot to node: the first of two hops."""
    per_node = placement.slots_per_rank * placement.ranks_per_node
    return _table([slot // per_node for slot in range(placement.num_slots)])


def within_node(placement: Placement, rank: int) -> Tensor:
    """Slot to local index on the node of `rank`, -1 for the slots of other nodes: the second hop."""
    first = rank // placement.ranks_per_node * placement.ranks_per_node
    ranks = [slot // placement.slots_per_rank - first for slot in range(placement.num_slots)]
    return _table([rank if 0 <= rank < placement.ranks_per_node else NOWHERE for rank in ranks])


def _table(of_slots: list[int]) -> Tensor:
    return torch.tensor([*of_slots, NOWHERE])


def local_slots(slots_MK: Tensor, slots_per_rank: int, rank: int) -> Tensor:
    """Received slots as numbers within `rank`'s own slots, -1 for those of other ranks."""
    local = slots_MK - rank * slots_per_rank
    return torch.where((local >= 0) & (local < slots_per_rank) & (slots_MK >= 0), local, NOWHERE)


def sum_copies(rows_CD: Tensor, places_NK: Tensor) -> Tensor:
    """The way back: the sum over each token's copies, in the order of its choices, [N, D] in FP32 (or FP64).

    Tokens without a copy get zeros. Deterministic: nothing is added atomically. For at most K copies a token; static
    shapes.
    """
    dtype = torch.promote_types(rows_CD.dtype, torch.float32)
    total_ND = rows_CD.new_zeros(places_NK.shape[0], rows_CD.shape[1], dtype=dtype)
    if not rows_CD.shape[0]:
        return total_ND + rows_CD.sum()  # of nothing: zero, and a part of the graph that others' backwards wait for
    for places_N in places_NK.unbind(1):
        rows_ND = rows_CD[places_N.clamp_min(0)].to(dtype)
        total_ND = total_ND + torch.where((places_N >= 0).unsqueeze(1), rows_ND, 0.0)
    return total_ND


def summed(rows_CD: Tensor, places_NK: Tensor) -> Tensor:
    """`sum_copies` without gradients: on a GPU in one launch, where that moves every row K times over."""
    if rows_CD.is_cuda and rows_CD.shape[0] and rows_CD.dtype != torch.float64:
        from teacher.parallel.exchange.sum_copies_triton import sum_copies_kernel

        return sum_copies_kernel(rows_CD, places_NK)
    return sum_copies(rows_CD, places_NK)
