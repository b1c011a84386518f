"""Sections of `benchmarks.parallel`: rows at fixed places, and a layer's FP8 experts behind them.

Shape legend: N tokens here, D hidden, K experts per token, E experts, I expert intermediate, Q places.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.parallel_timing import (
    ERROR,
    Row,
    Sizes,
    all_to_all_us,
    placement_of,
    row_of,
    shape_of,
    slowest_us,
    wrong_by,
)
from teacher.kernels.moe.experts import routed_experts_fp8
from teacher.kernels.moe.reference import ExpertWeights
from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Choice, Routes
from teacher.kernels.quantise.quantise import quantise
from teacher.model.fp8 import BLOCK
from teacher.parallel.exchange.fixed_places import ExpertInputs, FixedPlaces, routed_experts_over_ranks
from teacher.parallel.exchange.symmetric_places import SymmetricFixedPlaces
from teacher.parallel.groups import Ranks, exchange_counts


def places_and_layer(ranks: Ranks, sizes: Sizes) -> Iterator[Row]:
    prefill, decode = (form_of(ranks, sizes, tokens) for tokens in (sizes.prefill_tokens, sizes.decode_tokens))
    yield from fixed_places(ranks, sizes, prefill)
    yield from fp8_layer(ranks, sizes, {"prefill": prefill, "decode": decode})


def fixed_places(ranks: Ranks, sizes: Sizes, form: FixedPlaces) -> Iterator[Row]:
    tokens = form.max_tokens
    x, choice = routed_input(ranks, sizes, tokens)
    tables = placement_of(ranks, sizes).tables(ranks.device)
    received = form.dispatch(x, choice.indices_NK, choice.weights_NK, tables)
    error = wrong_by(x, choice.weights_NK, form.combine(scaled(received), received))
    out = torch.randn(received.x.values_MK.shape, device=ranks.device).to(torch.bfloat16)

    def dispatch() -> Tensor:
        return form.dispatch(x, choice.indices_NK, choice.weights_NK, tables).x.scale_inv_MG

    counts_R = torch.stack([(received.ranks_N >> rank & 1).sum() for rank in range(ranks.num_ranks)])
    send, receive = exchange_counts(counts_R, ranks.world)
    row_bytes = form.row_bytes
    for what, run, num_bytes, counts in (
        ("dispatch", dispatch, row_bytes[0], (send, receive)),
        ("combine", lambda: form.combine(out, received), row_bytes[1], (receive, send)),
    ):
        in_bytes = [[count * num_bytes for count in of_peers] for of_peers in counts]
        peers = {
            "all-to-all": all_to_all_us(ranks, *in_bytes, graph=True),
            "without a graph": slowest_us(ranks, run, graph=False),
        }
        leaving = sum(in_bytes[0]) - in_bytes[0][ranks.rank]
        us = slowest_us(ranks, run, graph=True)
        yield row_of(ranks, sizes, f"fixed places, {what}", tokens, us, leaving, peers, error)


def fp8_layer(ranks: Ranks, sizes: Sizes, forms: dict[str, FixedPlaces]) -> Iterator[Row]:
    """The peer is one rank that holds every expert, for as many tokens as each rank has here."""
    whole = layer_weights(ranks, sizes)
    placement = placement_of(ranks, sizes)
    num_own, tables = placement.slots_per_rank, placement.tables(ranks.device)
    own = ExpertWeights(*(part[ranks.rank * num_own : (ranks.rank + 1) * num_own] for part in whole))
    for what, form in forms.items():
        tokens = form.max_tokens
        x, choice = routed_input(ranks, sizes, tokens)

        def alone(x: Tensor = x, choice: Choice = choice) -> Tensor:
            return routed_experts_fp8(quantise(x), choice, whole)

        def over_ranks(form: FixedPlaces = form, x: Tensor = x, choice: Choice = choice) -> Tensor:
            return routed_experts_over_ranks(form, x, choice.indices_NK, choice.weights_NK, own, tables)

        wanted = alone().float()
        error = float((over_ranks().float() - wanted).abs().max() / wanted.abs().max())
        if not error <= ERROR:  # NaN is not
            raise RuntimeError(f"the layer's result is wrong: error {error:.2e}, at most {ERROR:.1e} is right")
        us = slowest_us(ranks, over_ranks, graph=True)
        peers = {"one rank": slowest_us(ranks, alone, graph=True)}
        yield Row(f"FP8 layer, {what}", ranks.num_ranks, shape_of(sizes, tokens), us, peers=peers, error=error)


def form_of(ranks: Ranks, sizes: Sizes, tokens: int) -> FixedPlaces:
    kind = SymmetricFixedPlaces if ranks.device.type == "cuda" else FixedPlaces
    sized = {"hidden": sizes.hidden, "per_token": sizes.per_token, "max_tokens": tokens}
    return kind(ranks, slots_per_rank=placement_of(ranks, sizes).slots_per_rank, **sized)


def routed_input(ranks: Ranks, sizes: Sizes, tokens: int) -> tuple[Tensor, Choice]:
    """x BF16, experts by V3's gate: from the best groups alone, weights that sum to 2.5."""
    generator = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    logits = torch.randn(tokens, sizes.experts, generator=generator).to(ranks.device)
    routes = Routes(sizes.per_token, *sizes.groups, norm_topk_prob=True, routed_scaling_factor=2.5)
    return x.to(ranks.device), route(logits, torch.zeros(sizes.experts, device=ranks.device), routes)


def layer_weights(ranks: Ranks, sizes: Sizes) -> ExpertWeights:
    """The same on every rank; products of numbers around one are around one."""
    generator = torch.Generator(ranks.device).manual_seed(0)

    def stack(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(sizes.experts, rows, columns, dtype=torch.float8_e4m3fn, device=ranks.device)
        for of_expert in values:
            of_expert.copy_(torch.randn(rows, columns, generator=generator, device=ranks.device))
        blocks = (sizes.experts, rows // BLOCK, columns // BLOCK)
        return values, torch.full(blocks, columns**-0.5, device=ranks.device)

    return ExpertWeights(*stack(2 * sizes.inner, sizes.hidden), *stack(sizes.hidden, sizes.inner))


def scaled(received: ExpertInputs) -> Tensor:
    """Output of experts that return their token: each row times the sum of this rank's weights, zero without any."""
    values_QD = received.x.values_MK.float() * received.x.scale_inv_MG.repeat_interleave(BLOCK, dim=1)
    share_Q1 = received.choice.weights_NK.sum(dim=1, keepdim=True)
    return torch.where(share_Q1 > 0, values_QD * share_Q1, 0.0).to(torch.bfloat16)
