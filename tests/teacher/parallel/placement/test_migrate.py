"""Weights that move between ranks while the model runs: afterwards everything is as if it had begun there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from distill.errors import DataError
from teacher.model.config import DeepseekV3Config
from teacher.model.experts import Experts
from teacher.model.router import Routing
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.exchange.moe import ExpertParallelExperts
from teacher.parallel.exchange.wire import Wire
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.balance import balanced_placement
from teacher.parallel.placement.migrate import move_weights, plan_moves
from teacher.parallel.placement.placement import Placement
from tests.teacher.parallel.process_ranks import run_ranks

EXPERTS, HIDDEN = 6, 128


@st.composite
def two_placements(draw: st.DrawFn) -> tuple[Placement, Placement]:
    nodes, per_node, slots = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    total = nodes * per_node * slots
    experts = draw(st.integers(1, total))
    placed = []
    for _ in range(2):
        spare = draw(st.lists(st.integers(0, experts - 1), min_size=total - experts, max_size=total - experts))
        order = draw(st.permutations([*range(experts), *spare]))
        placed.append(Placement(tuple(order), experts, nodes * per_node, per_node))
    return placed[0], placed[1]


@settings(max_examples=100, deadline=None)
@given(two_placements())
def test_moves_make_the_new_placement_out_of_the_old_one(placements: tuple[Placement, Placement]) -> None:
    old, new = placements
    slots = list(old.experts_S)
    moves = plan_moves(old, new)
    for expert, source, target in moves:
        assert old.experts_S[source] == expert != old.experts_S[target]
        slots[target] = expert
        here = set(old.of_rank(target // old.slots_per_rank))
        assert source // old.slots_per_rank == target // old.slots_per_rank or expert not in here  # no needless travel
    assert tuple(slots) == new.experts_S
    assert plan_moves(new, new) == []


def test_placements_of_other_shapes_do_not_meet() -> None:
    old = Placement.contiguous(num_experts=4, num_ranks=2)
    with pytest.raises(DataError, match="must stay as they are"):
        plan_moves(old, Placement.contiguous(num_experts=4, num_ranks=4))


def layer_of(ranks: Ranks, placement: Placement) -> ExpertParallelExperts:
    fields = {
        "vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 8, "moe_intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 2, "v_head_dim": 8, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
    }  # fmt: skip
    whole = Experts(DeepseekV3Config.model_validate(fields))
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    exchange = Exchange(ranks, placement, wire=Wire(out="fp32", back="fp32"))
    return ExpertParallelExperts(whole, exchange)


@torch.no_grad()
def moving(ranks: Ranks) -> tuple[list[int], list[bool], list[float]]:
    start = Placement((*range(EXPERTS), *range(EXPERTS)), EXPERTS, ranks.num_ranks, ranks.ranks_per_node)
    layer = layer_of(ranks, start)
    generator = torch.Generator().manual_seed(ranks.rank)
    x, scores = torch.randn(8, HIDDEN, generator=generator), torch.rand(8, EXPERTS, generator=generator)
    weights, indices = scores.topk(2, dim=1)
    first = layer(x, Routing(indices, weights, scores), "sorted")
    counts, same, errors = [], [], []
    for loads in ([9.0, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 5, 9], [1.0] * EXPERTS):
        new = balanced_placement(loads, num_ranks=ranks.num_ranks, slots_per_rank=start.slots_per_rank)
        moves = plan_moves(layer.exchange.placement, new)
        move_weights([layer.gate_up_proj, layer.down_proj], moves, ranks)
        counts.append(len(moves))
        fresh = layer_of(ranks, new)
        layer.exchange = fresh.exchange
        same.append(
            torch.equal(layer.gate_up_proj, fresh.gate_up_proj) and torch.equal(layer.down_proj, fresh.down_proj)
        )
        errors.append(float((layer(x, Routing(indices, weights, scores), "sorted") - first).abs().max()))
    return counts, same, errors


def test_weights_move_over_processes_and_outputs_stay(tmp_path) -> None:
    for counts, same, errors in run_ranks(moving, 4, tmp_path):
        assert min(counts) > 0
        assert all(same)
        assert max(errors) < 1e-5  # FP32 sums of two or three shares in another order
