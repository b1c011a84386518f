"""Types of routed experts and of rows sorted by expert, and their plain-torch twins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.dense.reference import block_gemm_twin
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.reference import Quantised, swiglu_quantise_twin


class ExpertWeights(NamedTuple):
    """E4M3 gate over up [E, 2I, D] and down [E, D, I], each with FP32 factors of its 128x128 blocks."""

    gate_up_E2ID: Tensor
    gate_up_scale_inv: Tensor  # [E, 2I / 128, D / 128]
    down_EDI: Tensor
    down_scale_inv: Tensor  # [E, D / 128, I / 128]


class Grouping(NamedTuple):
    """int32: the pair that each row holds (N * K where it is padding), the expert of each tile (-1 for none), loads."""

    pairs_R: Tensor
    experts_T: Tensor
    load_E: Tensor


class ExpertsTiling(NamedTuple):
    """Cut of the two products: `rows` a tile, a power of two from 16; `weights_first` for few tokens an expert.

    `fused` computes SwiGLU in the first product's registers; else tokens are gathered by expert (128 rows a tile) for
    the grouped products of `teacher.kernels.moe.experts_prefill`, which choose their own warps and stages.
    """

    rows: int
    weights_first: bool
    num_warps: int = 4
    num_stages: int = 6  # of gate and up: two blocks of weights each
    down_stages: int = 4
    fused: bool = True


def num_rows(num_pairs: int, num_experts: int, rows_a_tile: int) -> int:
    """Rows that suffice for every way to distribute the pairs: each expert that has any pads less than one tile."""
    used = min(num_pairs, num_experts)
    return -(-(num_pairs + used * (rows_a_tile - 1)) // rows_a_tile) * rows_a_tile


def align_twin(indices_NK: Tensor, num_experts: int, rows_a_tile: int) -> Grouping:
    """Rows for the pairs of int32 [N, K] in plain torch: experts in order, an expert's pairs in theirs."""
    flat = indices_NK.flatten().long()
    length = num_rows(flat.numel(), num_experts, rows_a_tile)
    pairs = torch.full((length,), flat.numel(), dtype=torch.int32, device=flat.device)
    experts = torch.full((length // rows_a_tile,), -1, dtype=torch.int32, device=flat.device)
    load_E = torch.bincount(flat[flat >= 0], minlength=num_experts).to(torch.int32)
    start = 0
    for expert in range(num_experts):
        of_expert = (flat == expert).nonzero().flatten()
        tiles = -(-of_expert.numel() // rows_a_tile)
        pairs[start : start + of_expert.numel()] = of_expert.to(torch.int32)
        experts[start // rows_a_tile : start // rows_a_tile + tiles] = expert
        start += tiles * rows_a_tile
    return Grouping(pairs, experts, load_E)


def routed_experts_twin(x: Quantised, choice: Choice, weights: ExpertWeights) -> Tensor:
    """`routed_experts_fp8` in plain torch, an expert at a time: BF16 [N, D]."""
    num_tokens, top_k = choice.indices_NK.shape
    hidden = weights.down_EDI.shape[1]
    out_PD = torch.zeros(num_tokens * top_k, hidden, dtype=torch.bfloat16, device=x.values_MK.device)
    flat, gates_P = choice.indices_NK.flatten(), choice.weights_NK.flatten()
    for expert in flat[flat >= 0].unique().tolist():
        pairs = (flat == expert).nonzero().flatten()
        rows = Quantised(x.values_MK[pairs // top_k], x.scale_inv_MG[pairs // top_k])
        gate_up = weights.gate_up_E2ID[expert], weights.gate_up_scale_inv[expert]
        inner = swiglu_quantise_twin(block_gemm_twin(rows, *gate_up, dtype=torch.float32))
        down = weights.down_EDI[expert], weights.down_scale_inv[expert]
        out = block_gemm_twin(inner, *down, dtype=torch.float32)
        out_PD[pairs] = (out * gates_P[pairs, None]).to(torch.bfloat16)
    total_ND = torch.zeros(num_tokens, hidden, device=out_PD.device)
    for of_choice_ND in out_PD.unflatten(0, (num_tokens, top_k)).unbind(1):
        total_ND = total_ND + of_choice_ND.float()
    return total_ND.to(torch.bfloat16)
