"""The dispatch plan as pure functions: every rank's plan is run here by hand, rows moving from list to list."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st

from distill.errors import DataError
from teacher.parallel.exchange import copies
from teacher.parallel.placement.placement import Placement


class World(NamedTuple):
    placement: Placement
    indices_by_rank: list[torch.Tensor]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks in nodes, experts with or without replicas, some ranks without tokens, at times one expert for all."""
    nodes, per_node, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = nodes * per_node
    experts = draw(st.integers(max(1, ranks * slots // 2), ranks * slots))
    spare = draw(st.lists(st.integers(0, experts - 1), min_size=ranks * slots - experts, max_size=ranks * slots))
    placed = draw(st.permutations([*range(experts), *spare[: ranks * slots - experts]]))
    per_token = draw(st.integers(1, min(4, experts)))
    favourite = draw(st.booleans())
    choice = st.permutations(range(experts)).map(lambda order: list(order)[:per_token])
    rows = st.just(list(range(per_token))) if favourite else choice
    tokens = [draw(st.lists(rows, max_size=5)) for _ in range(ranks)]
    indices = [torch.tensor(of_rank, dtype=torch.int64).view(-1, per_token) for of_rank in tokens]
    return World(Placement(tuple(placed), experts, ranks, per_node), indices)


def chosen(world: World) -> list[torch.Tensor]:
    tables = world.placement.tables()
    return [tables.choose(indices, rank=rank) for rank, indices in enumerate(world.indices_by_rank)]


def one_hop(rows: list[list], slots: list[torch.Tensor], table_of, peer_of, num_destinations: int):
    """Every rank's rows and slots after a hop, with the plans that the way back needs."""
    inbox: dict[int, list] = {rank: [] for rank in range(len(rows))}
    plans = []
    for rank, (of_rank, slots_NK) in enumerate(zip(rows, slots, strict=True)):
        sent = copies.find_copies(slots_NK, table_of(rank), num_destinations)
        counts = sent.counts_R.tolist()
        sources = sent.sources(sum(counts)).tolist()
        plans.append((sent, counts))
        for destination, count in enumerate(counts):
            for source in sources[sum(counts[:destination]) :][:count]:
                inbox[peer_of(rank, destination)].append((of_rank[source], slots_NK[source]))
    per_token = slots[0].shape[1]
    empty = torch.empty(0, per_token, dtype=torch.int64)
    received = [[row for row, _ in inbox[rank]] for rank in inbox]
    new_slots = [torch.stack([s for _, s in inbox[rank]]) if inbox[rank] else empty for rank in inbox]
    return received, new_slots, plans


def travelled(world: World, *, hops: int):
    slots = chosen(world)
    tokens = [[(rank, n) for n in range(len(of_rank))] for rank, of_rank in enumerate(slots)]
    placement = world.placement
    if hops == 1:
        table = copies.direct(placement)
        return one_hop(tokens, slots, lambda _: table, lambda _, to: to, placement.num_ranks)[:2]
    per_node = placement.ranks_per_node
    table = copies.to_nodes(placement)
    tokens, slots, _ = one_hop(
        tokens, slots, lambda _: table, lambda rank, node: node * per_node + rank % per_node, placement.num_nodes
    )
    return one_hop(
        tokens,
        slots,
        lambda rank: copies.within_node(placement, rank),
        lambda rank, local: rank // per_node * per_node + local,
        per_node,
    )[:2]


@settings(max_examples=30, deadline=None)
@given(worlds(), st.sampled_from([1, 2]))
def test_each_token_reaches_each_of_its_experts_once_and_each_rank_once(world: World, hops: int) -> None:
    received, slots = travelled(world, hops=hops)
    served: list[tuple] = []
    for rank, (tokens, slots_MK) in enumerate(zip(received, slots, strict=True)):
        assert len(set(tokens)) == len(tokens)  # once a rank, however many of its experts live there
        local = copies.local_slots(slots_MK, world.placement.slots_per_rank, rank)
        for token, of_token in zip(tokens, local.tolist(), strict=True):
            here = [world.placement.of_rank(rank)[slot] for slot in of_token if slot >= 0]
            assert here  # nobody gets a token that he has no expert for
            served += [(token, expert) for expert in here]
    wanted = [
        ((rank, n), expert)
        for rank, indices in enumerate(world.indices_by_rank)
        for n, of_token in enumerate(indices.tolist())
        for expert in of_token
    ]
    assert sorted(served) == sorted(wanted)


class Traffic(NamedTuple):
    """Copies between ranks, int64 [ranks, ranks], sender first; the diagonal stays on its rank.

    `first_hop` and `second_hop` of the way over two hops, `direct` of the other. Times the bytes of a row this is what
    links carry, each way.
    """

    direct: torch.Tensor
    first_hop: torch.Tensor
    second_hop: torch.Tensor

    def between_nodes(self, ranks_per_node: int) -> tuple[int, int]:
        """Copies that leave their node: (direct, over two hops)."""
        node = torch.arange(len(self.direct)) // ranks_per_node
        other = node.unsqueeze(1) != node
        return int(self.direct[other].sum()), int(self.first_hop[other].sum())


def traffic(slots_by_rank: list[torch.Tensor], placement: Placement) -> Traffic:
    """Copies that the slots [N, K] chosen on every rank make travel. Counted on the host."""
    ranks, per_node = placement.num_ranks, placement.ranks_per_node
    counts = torch.zeros(3, ranks, ranks, dtype=torch.int64)
    slot_to_rank, slot_to_node = copies.direct(placement), copies.to_nodes(placement)
    for rank, slots_NK in enumerate(slots_by_rank):
        counts[0, rank] = copies.find_copies(slots_NK, slot_to_rank, ranks).counts_R
        by_node = copies.find_copies(slots_NK, slot_to_node, placement.num_nodes)
        num_copies = by_node.counts_R.tolist()
        of_copies = slots_NK[by_node.sources(sum(num_copies))].split(num_copies)
        for node, slots_CK in enumerate(of_copies):
            forwarder = node * per_node + rank % per_node
            counts[1, rank, forwarder] += num_copies[node]
            onward = copies.find_copies(slots_CK, copies.within_node(placement, forwarder), per_node).counts_R
            counts[2, forwarder, node * per_node : (node + 1) * per_node] += onward
    return Traffic(*counts)


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_traffic_counts_what_travels(world: World) -> None:
    slots = chosen(world)
    placement = world.placement
    counted = traffic(slots, placement)
    for hops, arriving in ((1, counted.direct), (2, counted.second_hop)):
        received, _ = travelled(world, hops=hops)
        assert arriving.sum(dim=0).tolist() == [len(tokens) for tokens in received]
    direct_crossing, two_hop_crossing = counted.between_nodes(placement.ranks_per_node)
    node_of = placement.slots_per_rank * placement.ranks_per_node
    nodes_met = sum(
        len({slot // node_of for slot in of_token} - {rank // placement.ranks_per_node})
        for rank, slots_NK in enumerate(slots)
        for of_token in slots_NK.tolist()
    )
    assert two_hop_crossing == nodes_met <= direct_crossing
    # The first hop keeps the local index: rails never cross.
    sender, receiver = counted.first_hop.nonzero().unbind(1)
    assert torch.equal(sender % placement.ranks_per_node, receiver % placement.ranks_per_node)


def test_node_limited_routing_bounds_the_copies_between_nodes() -> None:
    """Eight nodes of eight ranks, 256 experts, eight a token out of at most four groups (a group is a node)."""
    generator = torch.Generator().manual_seed(0)
    placement = Placement.contiguous(num_experts=256, num_ranks=64, ranks_per_node=8)
    num_tokens = 32
    slots = []
    for _ in range(64):
        groups = torch.rand(num_tokens, 8, generator=generator).topk(4, dim=1).indices
        allowed = torch.zeros(num_tokens, 8, dtype=torch.bool).scatter(1, groups, True).repeat_interleave(32, dim=1)
        scores = torch.rand(num_tokens, 256, generator=generator).masked_fill(~allowed, -1.0)
        slots.append(scores.topk(8, dim=1).indices)
    counted = traffic(slots, placement)
    direct_crossing, two_hop_crossing = counted.between_nodes(8)
    assert two_hop_crossing <= 4 * 64 * num_tokens
    assert direct_crossing > 1.5 * two_hop_crossing  # what forwarding over NVLink saves on InfiniBand


@settings(max_examples=30, deadline=None)
@given(worlds(), st.integers(1, 3))
def test_copies_come_back_as_their_sum(world: World, width: int) -> None:
    table = copies.direct(world.placement)
    for slots_NK in chosen(world):
        sent = copies.find_copies(slots_NK, table, world.placement.num_ranks)
        num_copies = int(sent.counts_R.sum())
        sources = sent.sources(num_copies)
        rows = torch.arange(1, num_copies * width + 1, dtype=torch.float32).view(num_copies, width)
        wanted = torch.zeros(len(slots_NK), width).index_add(0, sources, rows)
        assert torch.equal(copies.sum_copies(rows, sent.places_NK), wanted)  # small integers: exact in any order


def test_replicas_share_their_experts_tokens_evenly() -> None:
    placement = Placement((0, 1, 0, 0), num_experts=2, num_ranks=2, ranks_per_node=2)
    slots = placement.tables().choose(torch.zeros(9, 1, dtype=torch.int64), rank=1)
    assert torch.bincount(slots.flatten(), minlength=4).tolist() == [3, 0, 3, 3]


@pytest.mark.parametrize(
    ("experts", "num_experts", "ranks", "per_node", "message"),
    [
        ((0, 1, 2), 3, 2, 2, "3 slots do not divide among 2 ranks"),
        ((0, 1), 2, 2, 3, "no whole number of nodes"),
        ((0, 0), 2, 2, 1, "no slot holds expert 1"),
        ((0, 2), 1, 2, 1, "expert 2 of 1 does not exist"),
    ],
)
def test_a_placement_that_cannot_be_says_why(experts, num_experts, ranks, per_node, message) -> None:
    with pytest.raises(DataError, match=message):
        Placement(experts, num_experts, ranks, per_node)
