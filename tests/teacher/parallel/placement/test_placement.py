"""The first placement, and tables that become another placement's where they lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from distill.errors import DataError
from teacher.parallel.placement.balance import imbalance
from teacher.parallel.placement.placement import Placement


@settings(max_examples=200, deadline=None)
@given(num_ranks=st.integers(1, 8), num_experts=st.integers(1, 40), spare=st.integers(0, 12))
def test_the_first_placement_is_in_order_and_its_copies_are_apart(num_ranks: int, num_experts: int, spare: int) -> None:
    num_redundant = -num_experts % num_ranks + spare * num_ranks
    placement = Placement.contiguous(num_experts=num_experts, num_ranks=num_ranks, num_redundant=num_redundant)
    assert placement.num_slots == num_experts + num_redundant
    copies = [len(slots) for slots in placement.slots_of_expert]
    assert max(copies) - min(copies) <= 1
    per_rank = placement.slots_per_rank
    for rank in range(num_ranks):
        experts = placement.of_rank(rank)
        assert all((b - a) % num_experts == 1 % num_experts for a, b in itertools.pairwise(experts))
        assert len(set(experts)) == min(per_rank, num_experts)
    if num_experts % num_ranks == 0:  # each rank has its share, and as many copies as any other
        assert imbalance(placement, [1.0] * num_experts) == pytest.approx(1.0)
        share = num_experts // num_ranks
        assert [placement.of_rank(rank)[0] for rank in range(num_ranks)] == [rank * share for rank in range(num_ranks)]


@pytest.mark.parametrize(("num_redundant", "num_ranks"), [(3, 2), (1, 4), (-2, 2), (0, 0), (-8, 4)])
def test_experts_that_do_not_divide_are_refused(num_redundant: int, num_ranks: int) -> None:
    with pytest.raises(DataError, match=f"num_redundant: .* do not divide among {num_ranks} ranks"):
        Placement.contiguous(num_experts=8, num_redundant=num_redundant, num_ranks=num_ranks)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 5))
def test_tables_become_those_of_any_placement(data: st.DataObject, num_experts: int, num_redundant: int) -> None:
    def drawn() -> Placement:
        spare = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=num_redundant, max_size=num_redundant))
        return Placement(tuple(data.draw(st.permutations([*range(num_experts), *spare]))), num_experts, 1, 1)

    tables, new = drawn().tables(), drawn()
    addresses = tables.slots_EC.data_ptr(), tables.num_copies_E.data_ptr()
    tables.become(new)
    assert (tables.slots_EC.data_ptr(), tables.num_copies_E.data_ptr()) == addresses
    # As many tokens as an expert has copies meet each of them once, whoever sends them.
    for expert, slots in enumerate(new.slots_of_expert):
        for rank in range(3):
            chosen = tables.choose(torch.full((len(slots), 1), expert), rank=rank)
            assert sorted(chosen.flatten().tolist()) == list(slots)
