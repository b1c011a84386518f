"""FP8 experts over gloo processes, every token at its fixed place: what they compute is what one process computes."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.moe.experts import routed_experts_fp8
from teacher.kernels.moe.reference import ExpertWeights
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.quantise import quantise
from teacher.model.fp8 import quantise_blocks
from teacher.parallel.exchange.fixed_places import FixedPlaces, routed_experts_over_ranks
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import Placement
from tests.teacher.expert_slots import own_experts
from tests.teacher.parallel.process_ranks import own, run_ranks

HIDDEN, INNER, EXPERTS, PER_TOKEN, MAX_TOKENS = 256, 128, 8, 3, 7
ROUTINGS = ("random", "skewed", "one")


def sizes_of(num_ranks: int) -> list[int]:
    """Tokens a rank; the second has none, the first a full inbox."""
    return [MAX_TOKENS if rank == 0 else 0 if rank == 1 else 4 for rank in range(num_ranks)]


def experts() -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [quantise_blocks(torch.randn(shape, generator=generator) * 0.06) for _ in range(EXPERTS)]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])

    return ExpertWeights(*stack(2 * INNER, HIDDEN), *stack(HIDDEN, INNER))


def problem(num_tokens: int, routing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator) + 0.1
    if routing == "skewed":
        scores = scores * torch.linspace(0.1, 1, EXPERTS).pow(4)
    if routing == "one":  # the first choice of every token is one and the same expert
        scores[:, EXPERTS - 1] += 10
    weights, indices = scores.topk(PER_TOKEN, dim=1)
    return x, indices, weights


def spread(ranks: Ranks) -> dict[str, torch.Tensor]:
    placement = Placement.contiguous(num_experts=EXPERTS, num_ranks=ranks.num_ranks)
    tables, sized = placement.tables(), {"hidden": HIDDEN, "per_token": PER_TOKEN, "max_tokens": MAX_TOKENS}
    form = FixedPlaces(ranks, slots_per_rank=placement.slots_per_rank, **sized)
    mine, sizes = own_experts(experts(), placement, ranks.rank), sizes_of(ranks.num_ranks)
    results = {}
    for routing in ROUTINGS:  # one after the other: inboxes are used again
        x, indices, weights = (own(ranks, part, sizes) for part in problem(sum(sizes), routing))
        results[routing] = routed_experts_over_ranks(form, x, indices, weights, mine, tables)
        given_quantised = routed_experts_over_ranks(form, quantise(x), indices, weights, mine, tables)
        assert torch.equal(results[routing], given_quantised)
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fp8_experts_over_ranks_compute_what_one_process_does(tmp_path, num_ranks) -> None:
    of_ranks = run_ranks(spread, num_ranks, tmp_path)
    whole, sizes = experts(), sizes_of(num_ranks)
    per_rank = EXPERTS // num_ranks
    for routing in ROUTINGS:
        got = torch.cat([of_rank[routing] for of_rank in of_ranks])
        x, indices, weights = problem(sum(sizes), routing)
        shares = []
        for rank in range(num_ranks):
            restricted = torch.where(indices // per_rank == rank, indices, -1).to(torch.int32)
            load = torch.bincount(restricted[restricted >= 0], minlength=EXPERTS).to(torch.int32)
            shares.append(routed_experts_fp8(quantise(x), Choice(restricted, weights, load), whole).float())
        # To the bit: the experts of each rank, rounded to BF16 as they travel, added in the order of the ranks.
        assert torch.equal(got, sum(shares[1:], shares[0]).to(torch.bfloat16)), routing
        load = torch.bincount(indices.flatten(), minlength=EXPERTS).to(torch.int32)
        once = routed_experts_fp8(quantise(x), Choice(indices.to(torch.int32), weights, load), whole).float()
        # A rounding to BF16, 2^-8 at most, of each share and of both sums; a hundredth for the roundings' products.
        bound = 2**-8 * (sum(share.abs() for share in shares) + once.abs() + got.float().abs())
        assert ((got.float() - once).abs() <= 1.01 * bound).all(), routing
