"""The Triton side of `teacher.kernels.moe.route`: a warp takes a token and keeps all its experts in registers.

Shape legend: N tokens, E routed experts, G groups, S experts a group, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import sigmoid
from teacher.kernels.moe import route_reference as twin
from teacher.kernels.moe.route_reference import Choice, Routes

LEAST_SUM = tl.constexpr(twin.LEAST_SUM)
LOWEST = tl.constexpr(float("-inf"))
LEAST_KEY = tl.constexpr(-(2**31))  # below that of minus infinity
TOKENS_A_PROGRAM = 1


@triton.jit
def _route(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, load_ptr, num_tokens, scaling, logits_stride,
    TOKENS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    G: tl.constexpr, KEPT: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, E)
    inside = tokens < num_tokens
    logits_N1 = logits_ptr + tokens.to(tl.int64)[:, None] * logits_stride
    logits_NE = tl.load(logits_N1 + experts[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    choice_NE = sigmoid(logits_NE) + tl.load(bias_ptr + experts)[None, :]
    if G > 1:
        choice_NE = _within_best_groups(choice_NE, TOKENS, E, G, KEPT)
    # Integers in the order of the numbers: their largest over a warp is one instruction.
    bits_NE = choice_NE.to(tl.int32, bitcast=True)
    keys_NE = bits_NE ^ ((bits_NE >> 31) & 0x7FFFFFFF)
    ranks = tl.arange(0, K_PADDED)
    indices_NK = tl.zeros((TOKENS, K_PADDED), tl.int32)
    for rank in tl.static_range(K):
        most_N = tl.max(keys_NE, axis=1)
        best_N = tl.min(tl.where(keys_NE == most_N[:, None], experts[None, :], E), axis=1)
        indices_NK = tl.where(ranks[None, :] == rank, best_N[:, None], indices_NK)
        keys_NE = tl.where(experts[None, :] == best_N[:, None], LEAST_KEY, keys_NE)
    written = inside[:, None] & (ranks[None, :] < K)
    weights_NK = sigmoid(tl.load(logits_N1 + indices_NK, mask=written, other=0.0).to(tl.float32))
    if NORMALISE:
        total_N = tl.zeros((TOKENS,), tl.float32)
        for rank in tl.static_range(K):  # in the order of the choice, as the twin adds; the zeros change nothing
            total_N += tl.sum(tl.where(ranks[None, :] == rank, weights_NK, 0.0), axis=1)
        weights_NK = tl.math.div_rn(weights_NK, tl.broadcast_to((total_N + LEAST_SUM)[:, None], (TOKENS, K_PADDED)))
    out = tokens[:, None] * K + ranks[None, :]
    tl.store(indices_ptr + out, indices_NK, mask=written)
    tl.store(weights_ptr + out, weights_NK * scaling, mask=written)
    # Whole numbers: their sum does not depend on which program comes first.
    tl.atomic_add(load_ptr + indices_NK, 1, mask=written, sem="relaxed")


@triton.jit
def _within_best_groups(choice_NE, TOKENS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr):
    """The choices, minus infinity outside the KEPT groups whose best two sum highest."""
    S: tl.constexpr = E // G
    choice_NGS = tl.reshape(choice_NE, (TOKENS, G, S))
    members = tl.arange(0, S)
    first_NG = tl.max(choice_NGS, axis=2)
    at_NG = tl.min(tl.where(choice_NGS == first_NG[:, :, None], members[None, None, :], S), axis=2)
    others_NGS = tl.where(members[None, None, :] == at_NG[:, :, None], LOWEST, choice_NGS)
    score_NG = first_NG + tl.max(others_NGS, axis=2)
    # A group is kept if fewer than KEPT come before it.
    groups = tl.arange(0, G)
    mine, others = score_NG[:, :, None], score_NG[:, None, :]
    before = (others > mine) | ((others == mine) & (groups[None, None, :] < groups[None, :, None]))
    kept_NG = tl.sum(before.to(tl.int32), axis=2) < KEPT
    return tl.reshape(tl.where(kept_NG[:, :, None], choice_NGS, LOWEST), (TOKENS, E))


def route_kernel(logits_NE: Tensor, bias_E: Tensor, routes: Routes) -> Choice:
    """Choose as `teacher.kernels.moe.route.route` does. The numbers of experts and of groups must be powers of two."""
    num_tokens, num_experts = logits_NE.shape
    for what, count in (("experts", num_experts), ("groups", routes.n_group)):
        if count & (count - 1):
            raise ValueError(f"the kernel takes a power of two of {what}, got {count}")
    top_k = routes.num_experts_per_tok
    device = logits_NE.device
    indices = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    load = torch.zeros(num_experts, dtype=torch.int32, device=device)
    if num_tokens:
        _route[(triton.cdiv(num_tokens, TOKENS_A_PROGRAM),)](
            logits_NE, bias_E, indices, weights, load, num_tokens, routes.routed_scaling_factor, logits_NE.stride(0),
            TOKENS=TOKENS_A_PROGRAM, E=num_experts, K=top_k, K_PADDED=triton.next_power_of_2(top_k),
            G=routes.n_group, KEPT=routes.topk_group, NORMALISE=routes.norm_topk_prob,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Choice(indices, weights, load)
