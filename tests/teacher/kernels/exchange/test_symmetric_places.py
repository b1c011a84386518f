"""Tokens stored to fixed places at the peers, by ranks in one process: bytes, choices and sums as over an exchange; and
the FP8 experts behind them give what all experts give on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teacher.kernels.moe.experts import default_tiling, routed_experts_fp8
from teacher.kernels.moe.reference import ExpertWeights
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.quantise import quantise, quantise_weight
from teacher.parallel.exchange.fixed_places import ExpertInputs, FixedPlaces
from teacher.parallel.exchange.symmetric_places import SymmetricFixedPlaces
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import Placement, SlotTables
from tests.teacher.expert_slots import own_experts
from tests.teacher.kernels.exchange.shared_inboxes import Shared

HIDDEN, INNER, PER_TOKEN, MAX_TOKENS = 384, 128, 3, 6
Tokens = list[tuple[Any, torch.Tensor, torch.Tensor]]


def forms(kind: type[FixedPlaces], placement: Placement, device: str, **options: Any) -> list[FixedPlaces]:
    shared = Shared(placement.num_ranks, device)
    sizes = {"hidden": HIDDEN, "per_token": PER_TOKEN, "max_tokens": MAX_TOKENS, "make_mailbox": shared, **options}
    sizes["slots_per_rank"] = placement.slots_per_rank
    made = []
    for rank in range(placement.num_ranks):
        ranks = Ranks(rank, placement.num_ranks, placement.num_ranks, torch.device(device), None, None, None)
        made.append(kind(ranks, **sizes))
    return made


def tokens(sizes: list[int], num_experts: int, routing: str, device: str, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        x = torch.randn(size, HIDDEN, generator=generator).to(torch.bfloat16)
        scores = torch.rand(size, num_experts, generator=generator) + 0.1
        if routing == "skewed":
            scores = scores * torch.linspace(0.1, 1, num_experts).pow(4)
        if routing == "one":  # all of a token's choices on the last rank
            scores[:, -PER_TOKEN:] += 10
        weights, indices = scores.topk(PER_TOKEN, dim=1)
        made.append(tuple(part.to(device) for part in (x, indices, weights)))
    return made


def dispatched(made: list[FixedPlaces], given: Tokens, tables: SlotTables) -> list[ExpertInputs]:
    sent = [form.send(*of_rank, tables) for form, of_rank in zip(made, given, strict=True)]
    return [form.received(ranks_N) for form, ranks_N in zip(made, sent, strict=True)]


def combined(made: list[FixedPlaces], outs: list[torch.Tensor], received: list[ExpertInputs]) -> list[torch.Tensor]:
    for form, out, of_rank in zip(made, outs, received, strict=True):
        form.send_back(out, of_rank)
    return [form.summed(of_rank.ranks_N) for form, of_rank in zip(made, received, strict=True)]


CASES = [
    (2, "random", [6, 5], False, {}),
    (2, "one", [6, 6], False, {"max_programs": 2}),
    (3, "random", [0, 6, 1], True, {"max_programs": 4}),
    (4, "skewed", [3, 0, 6, 0], False, {}),
    (8, "random", [1, 2, 0, 3, 0, 1, 6, 2], False, {}),
    (1, "random", [4], False, {}),
]


@pytest.mark.parametrize(("num_ranks", "routing", "sizes", "replicas", "options"), CASES)
@pytest.mark.parametrize("quantised", [False, True])
def test_stores_to_peers_equal_the_exchange(device, num_ranks, routing, sizes, replicas, options, quantised) -> None:
    experts = 4 * num_ranks
    placed = [*range(experts), *([0] * num_ranks if replicas else [])]
    placement = Placement(tuple(placed), experts, num_ranks, num_ranks)
    stored = forms(SymmetricFixedPlaces, placement, device, **options)
    twins = forms(FixedPlaces, placement, device)
    for seed in range(2):  # inboxes are used again, by other tokens of a layer whose experts lie elsewhere
        tables = Placement(tuple(placed[::-1] if seed else placed), experts, num_ranks, num_ranks).tables(device)
        given = tokens(sizes[::-1] if seed else sizes, experts, routing, device, seed)
        if quantised:
            given = [(quantise(x), *rest) for x, *rest in given]
        got, wanted = dispatched(stored, given, tables), dispatched(twins, given, tables)
        outs = []
        for of_rank, twin in zip(got, wanted, strict=True):
            assert torch.equal(of_rank.ranks_N, twin.ranks_N)
            for part, of_twin in zip(of_rank.choice, twin.choice, strict=True):
                assert part.dtype == of_twin.dtype
                assert torch.equal(part, of_twin)
            came = (of_rank.choice.indices_NK >= 0).any(dim=1)
            values, scales = of_rank.x
            assert torch.equal(values.view(torch.uint8)[came], twin.x.values_MK.view(torch.uint8)[came])
            assert torch.equal(scales[came], twin.x.scale_inv_MG[came])
            assert (values.is_contiguous(), scales.stride()) == (True, twin.x.scale_inv_MG.stride())
            outs.append(torch.randn(values.shape, device=device).to(torch.bfloat16))
        for sums, of_twins in zip(combined(stored, outs, got), combined(twins, outs, wanted), strict=True):
            assert torch.equal(sums, of_twins)


def all_experts(num_experts: int, device: str) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            quantise_weight((torch.randn(shape, generator=generator) * 0.06).to(device)) for _ in range(num_experts)
        ]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])

    return ExpertWeights(*stack(2 * INNER, HIDDEN), *stack(HIDDEN, INNER))


def load_of(indices_NK: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(indices_NK[indices_NK >= 0].flatten(), minlength=num_experts).to(torch.int32)


@pytest.mark.parametrize(
    ("num_ranks", "routing", "sizes"),
    [(2, "random", [6, 3]), (2, "one", [5, 6]), (4, "skewed", [2, 0, 6, 1])],
)
def test_fp8_experts_over_ranks_give_what_one_rank_does(device, num_ranks, routing, sizes) -> None:
    num_experts = 8
    placement = Placement.contiguous(num_experts=num_experts, num_ranks=num_ranks)
    experts, given = all_experts(num_experts, device), tokens(sizes, num_experts, routing, device)
    made = forms(SymmetricFixedPlaces, placement, device)
    tiling = default_tiling(sum(sizes) * PER_TOKEN, num_experts)
    received = dispatched(made, given, placement.tables(device))
    outs = [
        routed_experts_fp8(of_rank.x, of_rank.choice, own_experts(experts, placement, rank), tiling=tiling)
        for rank, of_rank in enumerate(received)
    ]
    got = combined(made, outs, received)
    for (x, indices, weights), of_rank in zip(given, got, strict=True):
        if not len(x):
            assert of_rank.shape == (0, HIDDEN)
            continue
        # To the bit: each rank's experts alone on one rank, rounded to BF16 as they travel, added in the ranks' order.
        shares = []
        for rank in range(num_ranks):
            here = indices // placement.slots_per_rank == rank
            restricted = torch.where(here, indices, -1).to(torch.int32)
            choice = Choice(restricted, weights, load_of(restricted, num_experts))
            shares.append(routed_experts_fp8(quantise(x), choice, experts, tiling=tiling).float())
        assert torch.equal(of_rank, sum(shares[1:], shares[0]).to(torch.bfloat16))
        # All experts at once are rounded to BF16 once, by 2^-8 of the sum at most; over ranks each share is too, and
        # then their sum. The hundredth is for the roundings' own products.
        choice = Choice(indices.to(torch.int32), weights, load_of(indices, num_experts))
        whole, sums = routed_experts_fp8(quantise(x), choice, experts, tiling=tiling).float(), of_rank.float()
        bound = 2**-8 * (sum(share.abs() for share in shares) + whole.abs() + sums.abs())
        assert ((sums - whole).abs() <= 1.01 * bound).all(), ((sums - whole).abs() / bound).max()


def test_what_does_not_fit_is_refused() -> None:
    ranks = Ranks(0, 1, 1, torch.device("cpu"), None, None, None)
    tables = Placement.contiguous(num_experts=2, num_ranks=1).tables()
    sizes = {"slots_per_rank": 2, "hidden": 128, "per_token": 1, "max_tokens": 4, "make_mailbox": Shared(1, "cpu")}
    with pytest.raises(ValueError, match="at most 31 ranks, got 32"):
        FixedPlaces(Ranks(0, 32, 32, torch.device("cpu"), None, None, None), **sizes)
    form = FixedPlaces(ranks, **sizes)
    with pytest.raises(ValueError, match="5 tokens, at most 4 fit"):
        form.dispatch(torch.zeros(5, 128), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), tables)
