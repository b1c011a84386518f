"""The Triton side of `teacher.kernels.route`: a program takes a few tokens and keeps all their experts in registers.

Shape legend: N tokens, E routed experts, G groups, S experts a group, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels import route as twin
from teacher.kernels.arithmetic_triton import sigmoid
from teacher.kernels.route import Choice, Routes

LEAST_SUM = tl.constexpr(twin.LEAST_SUM)
LOWEST = tl.constexpr(float("-inf"))
TOKENS_A_PROGRAM = 4


@triton.jit
def _route(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, load_ptr, num_tokens, scaling, logits_stride,
    TOKENS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    G: tl.constexpr, KEPT: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, E)
    inside = tokens < num_tokens
    places = tokens.to(tl.int64)[:, None] * logits_stride + experts[None, :]
    scores_NE = sigmoid(tl.load(logits_ptr + places, mask=inside[:, None], other=0.0).to(tl.float32))
    choice_NE = scores_NE + tl.load(bias_ptr + experts)[None, :]
    if G > 1:
        choice_NE = _within_best_groups(choice_NE, TOKENS, E, G, KEPT)
    ranks = tl.arange(0, K_PADDED)
    indices_NK = tl.zeros((TOKENS, K_PADDED), tl.int32)
    weights_NK = tl.zeros((TOKENS, K_PADDED), tl.float32)
    total_N = tl.zeros((TOKENS,), tl.float32)
    for rank in tl.static_range(K):
        best_N = tl.argmax(choice_NE, axis=1, tie_break_left=True)
        chosen_NE = experts[None, :] == best_N[:, None]
        gate_N = tl.sum(tl.where(chosen_NE, scores_NE, 0.0), axis=1)
        total_N += gate_N
        here = ranks[None, :] == rank
        indices_NK = tl.where(here, best_N[:, None], indices_NK)
        weights_NK = tl.where(here, gate_N[:, None], weights_NK)
        choice_NE = tl.where(chosen_NE, LOWEST, choice_NE)
        tl.atomic_add(load_ptr + best_N, 1, mask=inside, sem="relaxed")
    if NORMALISE:
        weights_NK = tl.math.div_rn(weights_NK, tl.broadcast_to((total_N + LEAST_SUM)[:, None], (TOKENS, K_PADDED)))
    out = tokens[:, None] * K + ranks[None, :]
    written = inside[:, None] & (ranks[None, :] < K)
    tl.store(indices_ptr + out, indices_NK, mask=written)
    tl.store(weights_ptr + out, weights_NK * scaling, mask=written)


@triton.jit
def _within_best_groups(choice_NE, TOKENS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr):
    """The choices, minus infinity outside the KEPT groups whose best two sum highest."""
    S: tl.constexpr = E // G
    choice_NGS = tl.reshape(choice_NE, (TOKENS, G, S))
    members = tl.arange(0, S)
    first_NG = tl.max(choice_NGS, axis=2)
    at_NG = tl.argmax(choice_NGS, axis=2, tie_break_left=True)
    others_NGS = tl.where(members[None, None, :] == at_NG[:, :, None], LOWEST, choice_NGS)
    score_NG = first_NG + tl.max(others_NGS, axis=2)
    groups = tl.arange(0, G)
    kept_NG = tl.zeros((TOKENS, G), tl.int32)
    for _ in tl.static_range(KEPT):
        best_N = tl.argmax(score_NG, axis=1, tie_break_left=True)
        taken_NG = groups[None, :] == best_N[:, None]
        kept_NG = tl.where(taken_NG, 1, kept_NG)
        score_NG = tl.where(taken_NG, LOWEST, score_NG)
    return tl.reshape(tl.where(kept_NG[:, :, None] > 0, choice_NGS, LOWEST), (TOKENS, E))


def route_kernel(logits_NE: Tensor, bias_E: Tensor, routes: Routes) -> Choice:
    """As `teacher.kernels.route.route`. The numbers of experts and of groups must be powers of two."""
    num_tokens, num_experts = logits_NE.shape
    for what, count in (("experts", num_experts), ("groups", routes.n_group)):
        if count & (count - 1):
            raise ValueError(f"the kernel takes a power of two of {what}, got {count}")
    top_k = routes.num_experts_per_tok
    device = logits_NE.device
    indices = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    load = torch.zeros(num_experts, dtype=torch.int32, device=device)
    tokens_a_program = TOKENS_A_PROGRAM if num_tokens >= 512 else 1
    if num_tokens:
        _route[(triton.cdiv(num_tokens, tokens_a_program),)](
            logits_NE, bias_E, indices, weights, load, num_tokens, routes.routed_scaling_factor, logits_NE.stride(0),
            TOKENS=tokens_a_program, E=num_experts, K=top_k, K_PADDED=triton.next_power_of_2(top_k),
            G=routes.n_group, KEPT=routes.topk_group, NORMALISE=routes.norm_topk_prob, enable_fp_fusion=False,
        )  # fmt: skip
    return Choice(indices, weights, load)
