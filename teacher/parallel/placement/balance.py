"""Places of experts, from how much they are used: hot ones several times, ranks loaded evenly (2412.19437 s.3.4.1).

    1. groups to nodes, where the routing groups divide among the nodes: a group's experts stay on one node, which is
       what node-limited routing (s.2.1.2) counts on. Else all ranks are packed as one node, and ranks end up more
       evenly loaded: a few groups cannot be packed as evenly as many experts.
    2. copies: each spare slot goes to the expert whose copies are loaded most. No other numbers of copies have a lower
       largest load a copy.
    3. copies to ranks: the heaviest first, each to the least loaded rank that has a slot free and not this expert yet;
       then slots change places between the most loaded rank and others while that makes the larger of the two smaller.
    4. ranks, and slots in them, are named so that as much as possible stays where it is.

Moving weights costs time, so `rebalanced` moves only for a gain that is worth it.

Shape legend: E experts, S slots.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from distill.errors import DataError
from teacher.parallel.placement.placement import Placement


class Rebalance(NamedTuple):
    """`before` and `after`: load of the most loaded rank over the mean, under the loads given; 1 is even.

    `placement` is the old one where the gain was too small, and `after` then equals `before`.
    """

    placement: Placement
    before: float
    after: float


@dataclass
class _Bin:
    """A rank (or node) being filled: items are numbers of whatever is packed, `kinds` what must not meet itself."""

    capacity: int
    load: float = 0.0
    items: list[int] = field(default_factory=list)


def rank_loads(placement: Placement, loads_E: Sequence[float]) -> list[float]:
    """Load of every rank; the copies of an expert share its load evenly (`SlotTables.choose`)."""
    share_E = [load / len(slots) for load, slots in zip(loads_E, placement.slots_of_expert, strict=True)]
    return [sum(share_E[expert] for expert in placement.of_rank(rank)) for rank in range(placement.num_ranks)]


def imbalance(placement: Placement, loads_E: Sequence[float]) -> float:
    """The most loaded rank over the mean; 1 where nothing is loaded."""
    loads = rank_loads(placement, loads_E)
    return max(loads) * len(loads) / total if (total := sum(loads)) else 1.0


def rebalanced(
    current: Placement, loads_E: Sequence[float], *, num_groups: int = 1, least_gain: float = 0.05
) -> Rebalance:
    """The placement to use from now on: a new one if it lowers the imbalance by at least `least_gain` of itself.

    `loads_E` are tokens per expert over a window of the caller's. Raises DataError for loads that are negative, not
    finite or of another number of experts.
    """
    before = imbalance(current, _checked(loads_E, current.num_experts))
    new = balanced_placement(
        loads_E,
        num_ranks=current.num_ranks,
        slots_per_rank=current.slots_per_rank,
        ranks_per_node=current.ranks_per_node,
        num_groups=num_groups,
    )
    after = imbalance(new, loads_E)
    if after > before * (1.0 - least_gain):
        return Rebalance(current, before, before)
    return Rebalance(renamed(new, current), before, after)


def balanced_placement(
    loads_E: Sequence[float],
    *,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None = None,
    num_groups: int = 1,
) -> Placement:
    """A placement for these loads, deterministic. Raises DataError where slots are fewer than experts."""
    per_node, num_experts = ranks_per_node or num_ranks, len(loads_E)
    loads_E = _checked(loads_E, num_experts)
    if num_ranks % per_node or num_experts % num_groups:
        raise DataError(f"{num_ranks} ranks in nodes of {per_node}, {num_experts} experts in {num_groups} groups")
    if num_ranks * slots_per_rank < num_experts:
        raise DataError(f"{num_ranks} ranks of {slots_per_rank} slots have no room for {num_experts} experts")
    num_nodes = num_ranks // per_node
    experts_of_node = [list(range(num_experts))]
    if num_nodes > 1 and num_groups % num_nodes == 0:
        experts_of_node = _groups_to_nodes(loads_E, num_groups, num_nodes)
    ranks = num_ranks // len(experts_of_node)
    slots: list[int] = []
    for experts in experts_of_node:
        copies = _replicated(experts, loads_E, ranks * slots_per_rank, ranks)
        for rank in _packed([share for share, _ in copies], [kind for _, kind in copies], ranks, slots_per_rank):
            slots += sorted(copies[item][1] for item in rank.items)
    return Placement(tuple(slots), num_experts, num_ranks, per_node)


def _checked(loads_E: Sequence[float], num_experts: int) -> list[float]:
    loads = [float(load) for load in loads_E]
    if len(loads) != num_experts or not all(0.0 <= load < float("inf") for load in loads):
        raise DataError(
            f"loads must be {num_experts} numbers from 0 up, got {len(loads)} from {min(loads, default=0)} up"
        )
    return loads


def _groups_to_nodes(loads_E: Sequence[float], num_groups: int, num_nodes: int) -> list[list[int]]:
    size = len(loads_E) // num_groups
    load_of_group = [sum(loads_E[group * size : (group + 1) * size]) for group in range(num_groups)]
    nodes = _packed(load_of_group, list(range(num_groups)), num_nodes, num_groups // num_nodes)
    return [[group * size + n for group in sorted(node.items) for n in range(size)] for node in nodes]


def _replicated(
    experts: Sequence[int], loads_E: Sequence[float], num_slots: int, num_ranks: int
) -> list[tuple[float, int]]:
    """(load, expert) of every copy. An expert gets no more copies than ranks, unless all have as many."""
    copies = dict.fromkeys(experts, 1)
    heap = [(-loads_E[expert], expert) for expert in experts]
    heapq.heapify(heap)
    for _ in range(num_slots - len(experts)):
        if not heap:  # more slots than all experts on all ranks: what remains is filled in turn
            heap = [(-loads_E[expert] / copies[expert], expert) for expert in experts]
            heapq.heapify(heap)
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] % num_ranks:
            heapq.heappush(heap, (-loads_E[expert] / copies[expert], expert))
    return [(loads_E[expert] / count, expert) for expert, count in copies.items() for _ in range(count)]


def _packed(loads: Sequence[float], kinds: Sequence[int], num_bins: int, capacity: int) -> list[_Bin]:
    """Items to bins of `capacity` each, evenly loaded; two of a kind meet only where it cannot be helped."""
    bins = [_Bin(capacity) for _ in range(num_bins)]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    # The most replicated kinds first among equals: they have the fewest bins to choose from.
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], -counts[kinds[i]], kinds[i])):
        free = [place for place in bins if len(place.items) < capacity]
        apart = [place for place in free if kinds[item] not in {kinds[other] for other in place.items}]
        least = min(apart or free, key=lambda place: (place.load, len(place.items)))
        least.items.append(item)
        least.load += loads[item]
    _separate(bins, kinds, loads)
    for _ in range(8 * num_bins):
        if not _improve(bins, loads, kinds):
            break
    return bins


def _swap(a: _Bin, i: int, b: _Bin, j: int, loads: Sequence[float]) -> None:
    moved = loads[a.items[i]] - loads[b.items[j]]
    a.items[i], b.items[j] = b.items[j], a.items[i]
    a.load, b.load = a.load - moved, b.load + moved


def _allowed(a: _Bin, i: int, b: _Bin, j: int, kinds: Sequence[int]) -> bool:
    """Tell whether a swap brings no kind to where it is already."""
    gets, gives = kinds[b.items[j]], kinds[a.items[i]]
    if gets == gives:
        return True
    return gets not in {kinds[item] for item in a.items} and gives not in {kinds[item] for item in b.items}


def _separate(bins: list[_Bin], kinds: Sequence[int], loads: Sequence[float]) -> None:
    """Part what met only because the last bins with room already had its kind."""
    for a in bins:
        for i, item in enumerate(a.items):
            if kinds[item] in {kinds[other] for other in a.items[:i]}:
                swaps = [
                    (b, j) for b in bins if b is not a for j in range(len(b.items)) if _allowed_apart(a, i, b, j, kinds)
                ]
                if swaps:
                    b, j = min(swaps, key=lambda swap: abs(loads[a.items[i]] - loads[swap[0].items[swap[1]]]))
                    _swap(a, i, b, j, loads)


def _allowed_apart(a: _Bin, i: int, b: _Bin, j: int, kinds: Sequence[int]) -> bool:
    return kinds[b.items[j]] != kinds[a.items[i]] and _allowed(a, i, b, j, kinds)


def _improve(bins: list[_Bin], loads: Sequence[float], kinds: Sequence[int]) -> bool:
    """One swap of the fullest bin with another that makes the larger of the two as small as can be; False if none."""
    a = max(bins, key=lambda place: place.load)
    best: tuple[float, _Bin, int, int] | None = None
    for b in bins:
        gap = a.load - b.load
        for i, mine in enumerate(a.items):
            for j, other in enumerate(b.items):
                moved = loads[mine] - loads[other]
                # Both sides of the swap end below what the fuller one had.
                if 1e-9 * a.load < moved < gap and _allowed(a, i, b, j, kinds):
                    larger = max(a.load - moved, b.load + moved)
                    if best is None or larger < best[0]:
                        best = larger, b, i, j
    if best is None:
        return False
    _swap(a, best[2], best[1], best[3], loads)
    return True


def renamed(new: Placement, current: Placement) -> Placement:
    """The same placement with nodes, ranks of a node and slots of a rank in the order that moves least (greedily)."""
    per_node = new.ranks_per_node

    def of_node(placement: Placement, node: int) -> list[int]:
        return [expert for rank in range(node * per_node, (node + 1) * per_node) for expert in placement.of_rank(rank)]

    all_nodes = range(new.num_nodes)
    nodes = _matched([of_node(current, node) for node in all_nodes], [of_node(new, node) for node in all_nodes])
    slots: list[int] = []
    for node, source in enumerate(nodes):
        old = [current.of_rank(node * per_node + local) for local in range(per_node)]
        fresh = [new.of_rank(source * per_node + local) for local in range(per_node)]
        for before, chosen in zip(old, _matched(old, fresh), strict=True):
            slots += _kept_in_place(before, fresh[chosen])
    return Placement(tuple(slots), new.num_experts, new.num_ranks, per_node)


def _matched(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[int]:
    """Find one of the new sets for each old one, those with most in common first."""
    common = sorted(
        ((-len(set(a) & set(b)), i, j) for i, a in enumerate(old) for j, b in enumerate(new)),
    )
    of_old: dict[int, int] = {}
    for _, i, j in common:
        if i not in of_old and j not in of_old.values():
            of_old[i] = j
    return [of_old[i] for i in range(len(old))]


def _kept_in_place(before: Sequence[int], after: Sequence[int]) -> list[int]:
    rest, kept = list(after), []
    for expert in before:
        kept.append(expert if expert in rest else None)
        if expert in rest:
            rest.remove(expert)
    return [rest.pop(0) if expert is None else expert for expert in kept]
