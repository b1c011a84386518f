"""Experts' weights to the slots of a new placement, between two steps, while the model stays in memory.

The plan is a pure function that every rank computes alike: for each slot whose expert changes, a slot that holds it
now, on the same rank if one does, else on the same node, else anywhere, senders taking turns. Slots are sources and
targets at once, so what arrives waits beside the weights until everything has left: memory for as many slots as a rank
receives, one tensor at a time.

Weights keep their addresses. On a GPU all is in the order of the current stream: behind the step that was launched
last, before the next one, and the host does not wait. CUDA graphs stay valid if the tables too are changed in place
(`SlotTables.become`, as `teacher.parallel.placement.rebalance` does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import DataError
from teacher.parallel.groups import Ranks, lost_peers
from teacher.parallel.placement.placement import Placement


class Move(NamedTuple):
    expert: int
    source_slot: int
    target_slot: int


def plan_moves(old: Placement, new: Placement) -> list[Move]:
    """Copies that make `new` out of `old`, in the order of their targets. Raises DataError for unlike shapes.

    >>> old, new = (Placement(experts, 2, 2, 2) for experts in ((0, 1, 0, 1), (0, 1, 1, 1)))
    >>> plan_moves(old, new)
    [Move(expert=1, source_slot=3, target_slot=2)]
    """
    shapes = [(p.num_experts, p.num_slots, p.num_ranks, p.ranks_per_node) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"experts, slots, ranks and ranks per node must stay as they are, got {shapes[0]} and {shapes[1]}"
        )
    sent: Counter[int] = Counter()
    moves = []
    for target, (before, expert) in enumerate(zip(old.experts_S, new.experts_S, strict=True)):
        if before != expert:
            source = min(old.slots_of_expert[expert], key=lambda slot, t=target: _cost(slot, t, old, sent))
            if source // old.slots_per_rank != target // old.slots_per_rank:
                sent[source // old.slots_per_rank] += 1
            moves.append(Move(expert, source, target))
    return moves


def _cost(source: int, target: int, placement: Placement, sent: Counter[int]) -> tuple[bool, bool, int, int]:
    """Other node, other rank, what the sender has to send already, and the slot for a fixed order."""
    sender, receiver = source // placement.slots_per_rank, target // placement.slots_per_rank
    per_node = placement.ranks_per_node
    return sender // per_node != receiver // per_node, sender != receiver, sent[sender], source


@torch.no_grad()
def move_weights(weights: Sequence[Tensor], moves: Sequence[Move], ranks: Ranks) -> None:
    """Carry out `moves` on this rank's stacked weights, contiguous [slots, ...] each, in place. Collective.

    Raises EnvironmentFault where a rank is lost: weights of the survivors are then of neither placement.
    """
    for tensor in weights:
        weight = tensor.view(torch.uint8)  # gloo knows no E4M3
        per_rank = weight.shape[0]
        work: list[dist.P2POp] = []
        waiting: list[tuple[int, Tensor]] = []
        # Every pair of ranks walks the moves in the same order, which is how sends and receives find each other.
        for _, source, target in moves:
            sender, receiver = source // per_rank, target // per_rank
            if ranks.rank not in (sender, receiver):
                continue
            row = weight[source % per_rank] if sender == ranks.rank else torch.empty_like(weight[0])
            if sender == receiver:
                row = row.clone()
            elif receiver == ranks.rank:
                work.append(dist.P2POp(dist.irecv, row, sender, group=ranks.world))
            else:
                work.append(dist.P2POp(dist.isend, row.contiguous(), receiver, group=ranks.world))
            if receiver == ranks.rank:
                waiting.append((target % per_rank, row))
        with lost_peers(ranks.world):
            for request in dist.batch_isend_irecv(work) if work else []:
                request.wait()
        for slot, row in waiting:
            weight[slot].copy_(row)
