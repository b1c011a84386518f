"""Cases of the routed experts of a DeepSeek-V3 layer, from the gate's logits to the weighted sum.

The load is uniform: logits are independent, so the experts that T tokens hit are about 256 (1 - (1 - 8/256)^T). The
floor counts those that were hit. Every layer has the same 11.3 GB of weights, whose bits are random; one token's eight
experts outsize the L2 seven times, and each input set hits others.

Shape legend: T tokens, D hidden, E experts, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Work, relative_error
from benchmarks.kernels.inputs import Tokens, e4m3_bits, normal, uniform
from benchmarks.kernels.peers import vllm_experts
from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.moe.experts import default_tiling, routed_experts_fp8
from teacher.kernels.moe.reference import ExpertWeights, routed_experts_twin
from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Routes, route_twin
from teacher.kernels.quantise.quantise import quantise
from teacher.kernels.quantise.reference import quantise_twin
from teacher.model.fp8 import BLOCK

TOKENS = (1, 8, 32, 64, 128, 1_024, 4_096)
# Sums of another order turn a rare E4M3 rounding of the intermediate; where gate and up are rounded to BF16 first, one
# in thirty turns, and none is worse against FP64 (tests/teacher/kernels/moe/test_routed_experts.py).
TOLERANCE, UNFUSED_TOLERANCE, PEER_TOLERANCE = 1e-2, 2e-2, 4e-2


class Layer(NamedTuple):
    num_experts: int
    hidden: int
    inner: int
    routes: Routes


V3 = Layer(256, 7_168, 2_048, Routes(8, 8, 4, True, 2.5))
TOY = Layer(8, 256, 128, Routes(2, 4, 2, True, 2.5))


def cases(*, toy: bool) -> Iterator[Case]:
    layer = TOY if toy else V3
    for num_tokens in (1, 9, 600) if toy else TOKENS:
        shape = f"{num_tokens} x {layer.num_experts}x{layer.hidden}x{layer.inner}"
        yield Case("routed experts", shape, partial(_experts, layer, num_tokens))


@cache
def weights_of(layer: Layer, device: torch.device) -> ExpertWeights:
    """Random bits; factors that bring the intermediate and the result near one."""
    num_experts, hidden, inner, _ = layer
    typical = 105.0  # root mean square of E4M3 numbers of random bits

    def factors(seed: int, rows: int, columns: int) -> Tensor:
        scale = 1 / (typical * columns**0.5)
        shape = num_experts, rows // BLOCK, columns // BLOCK
        return uniform(device, seed, *shape, low=0.5 * scale, high=1.5 * scale)

    return ExpertWeights(
        e4m3_bits(device, 0, num_experts, 2 * inner, hidden),
        factors(1, 2 * inner, hidden),
        e4m3_bits(device, 2, num_experts, hidden, inner),
        factors(3, hidden, inner),
    )


def _experts(layer: Layer, num_tokens: int, device: torch.device) -> Work:
    num_experts, hidden, inner, routes = layer
    weights = weights_of(layer, device)
    tiling = default_tiling(num_tokens * routes.num_experts_per_tok, num_experts)
    least_sets = 8 if num_tokens <= 8 else 2

    def make(seed: int) -> Tokens:
        logits = normal(device, 3 * seed, num_tokens, num_experts, dtype=torch.float32)
        bias = normal(device, 3 * seed + 1, num_experts, dtype=torch.float32) * 1e-3
        return Tokens(normal(device, 3 * seed + 2, num_tokens, hidden), logits, bias)

    hit = sum(int((route_twin(*make(seed)[1:], routes).load_E > 0).sum()) for seed in range(least_sets)) / least_sets
    expert_bytes = 3 * hidden * inner * (1 + 4 / BLOCK**2)

    def run(given: Tokens) -> Tensor:
        return routed_experts_fp8(quantise(given.x_TD), route(given.logits_TE, given.bias_E, routes), weights)

    def error(got: Tensor, given: Tokens) -> float:
        choice = route_twin(given.logits_TE, given.bias_E, routes)
        return relative_error(got, routed_experts_twin(quantise_twin(given.x_TD), choice, weights))

    return Work(
        run,
        make,
        error,
        tolerance=TOLERANCE if tiling.fused or runs_hopper_kernels(device) else UNFUSED_TOLERANCE,
        size_bytes=round(hit * expert_bytes) + num_tokens * (4 * hidden + 4 * num_experts),
        flop=6 * hidden * inner * routes.num_experts_per_tok * num_tokens,
        product="fp8",
        peers=lambda: {"vLLM fused_experts (Triton)": vllm_experts(device, weights, routes, PEER_TOLERANCE)},
        least_sets=least_sets,
    )
