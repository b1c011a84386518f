"""The Triton side of `teacher.kernels.moe.experts`.

Shape legend: N tokens, D hidden, E routed experts, K experts per token, P = N * K pairs, I expert intermediate, R rows
with padding, T tiles of rows, B = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.kernels.arithmetic_triton import sigmoid, to_dtype, to_e4m3
from teacher.kernels.moe.align_triton import align_kernel
from teacher.kernels.moe.grouped_triton import sum_choices_kernel
from teacher.kernels.moe.reference import ExpertsTiling, ExpertWeights
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise import reference as quantise_twin
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.model.fp8 import BLOCK, E4M3_MAX

B = tl.constexpr(BLOCK)
MAX = tl.constexpr(E4M3_MAX)
LEAST = tl.constexpr(quantise_twin.LEAST_MAGNITUDE)


@triton.jit
def _gate_up(
    x_ptr, x_scale_ptr, weight_desc, weight_scale_ptr, pairs_ptr, experts_ptr, out_ptr, out_scale_ptr,
    num_pairs, x_scale_stride, out_scale_stride, top_k,
    HIDDEN_GROUPS: tl.constexpr, INNER_GROUPS: tl.constexpr, ROWS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of rows, 128 columns of gate and the same of up: SwiGLU and its quantisation in registers."""
    tile, column_group = tl.program_id(1), tl.program_id(0)
    expert = tl.load(experts_ptr + tile)
    if expert >= 0:
        rows = tile * ROWS + tl.arange(0, ROWS)
        pairs = tl.load(pairs_ptr + rows)
        inside = pairs < num_pairs
        tokens = (pairs // top_k).to(tl.int64)
        inner = tl.arange(0, B)
        width: tl.constexpr = HIDDEN_GROUPS * B
        gate_row = (expert * 2 * INNER_GROUPS + column_group) * B
        up_row = gate_row + INNER_GROUPS * B
        gate_scale_ptr = weight_scale_ptr + (expert * 2 * INNER_GROUPS + column_group) * HIDDEN_GROUPS
        up_scale_ptr = gate_scale_ptr + INNER_GROUPS * HIDDEN_GROUPS
        if WEIGHTS_FIRST:
            gate, up = tl.zeros((B, ROWS), tl.float32), tl.zeros((B, ROWS), tl.float32)
        else:
            gate, up = tl.zeros((ROWS, B), tl.float32), tl.zeros((ROWS, B), tl.float32)
        # The factors are loaded a step ahead: unlike the tiles, nothing else hides their way from memory.
        x_scale = tl.load(x_scale_ptr + tokens, mask=inside, other=0.0)
        gate_weight_scale = tl.load(gate_scale_ptr)
        up_weight_scale = tl.load(up_scale_ptr)
        for group in range(HIDDEN_GROUPS):
            k = group * B + inner
            gate_scale = x_scale * gate_weight_scale
            up_scale = x_scale * up_weight_scale
            ahead = min(group + 1, HIDDEN_GROUPS - 1)
            x_scale = tl.load(x_scale_ptr + ahead * x_scale_stride + tokens, mask=inside, other=0.0)
            gate_weight_scale = tl.load(gate_scale_ptr + ahead)
            up_weight_scale = tl.load(up_scale_ptr + ahead)
            gate_weight = weight_desc.load([gate_row, group * B])
            up_weight = weight_desc.load([up_row, group * B])
            if WEIGHTS_FIRST:
                x = tl.load(x_ptr + tokens[None, :] * width + k[:, None], mask=inside[None, :], other=0.0)
                gate += tl.dot(gate_weight, x) * gate_scale[None, :]
                up += tl.dot(up_weight, x) * up_scale[None, :]
            else:
                x = tl.load(x_ptr + tokens[:, None] * width + k[None, :], mask=inside[:, None], other=0.0)
                gate += tl.dot(x, gate_weight.T) * gate_scale[:, None]
                up += tl.dot(x, up_weight.T) * up_scale[:, None]
        columns = column_group * B + inner
        # The FP32 sums of gate and up never leave the registers: SwiGLU, then a scale for each row's 128.
        activated = gate * sigmoid(gate) * up
        axis: tl.constexpr = 0 if WEIGHTS_FIRST else 1
        largest = tl.maximum(tl.max(tl.abs(activated), axis=axis), LEAST)
        scale = tl.math.div_rn(MAX, largest)
        out_rows = rows.to(tl.int64)
        if WEIGHTS_FIRST:
            values = to_e4m3(activated * scale[None, :])
            tl.store(out_ptr + out_rows[None, :] * (INNER_GROUPS * B) + columns[:, None], values)
        else:
            values = to_e4m3(activated * scale[:, None])
            tl.store(out_ptr + out_rows[:, None] * (INNER_GROUPS * B) + columns[None, :], values)
        tl.store(out_scale_ptr + column_group * out_scale_stride + rows, tl.math.div_rn(largest, MAX))


@triton.jit
def _down(
    x_desc, x_scale_ptr, weight_desc, weight_scale_ptr, pairs_ptr, experts_ptr, gates_ptr, out_ptr,
    num_pairs, x_scale_stride,
    HIDDEN_GROUPS: tl.constexpr, INNER_GROUPS: tl.constexpr, ROWS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of rows and 128 columns of the down projection, times the gates, to the rows' own pairs."""
    tile, column_group = tl.program_id(1), tl.program_id(0)
    expert = tl.load(experts_ptr + tile)
    if expert >= 0:
        rows = tile * ROWS + tl.arange(0, ROWS)
        pairs = tl.load(pairs_ptr + rows)
        inside = pairs < num_pairs
        gates = tl.load(gates_ptr + pairs, mask=inside, other=0.0)
        inner = tl.arange(0, B)
        weight_row = (expert * HIDDEN_GROUPS + column_group) * B
        weight_scale_ptr += (expert * HIDDEN_GROUPS + column_group) * INNER_GROUPS
        if WEIGHTS_FIRST:
            sums = tl.zeros((B, ROWS), tl.float32)
        else:
            sums = tl.zeros((ROWS, B), tl.float32)
        # The factors are loaded a step ahead: unlike the tiles, nothing else hides their way from memory.
        x_scale = tl.load(x_scale_ptr + rows, mask=inside, other=0.0)
        weight_scale = tl.load(weight_scale_ptr)
        for group in range(INNER_GROUPS):
            scale = x_scale * weight_scale
            ahead = min(group + 1, INNER_GROUPS - 1)
            x_scale = tl.load(x_scale_ptr + ahead * x_scale_stride + rows, mask=inside, other=0.0)
            weight_scale = tl.load(weight_scale_ptr + ahead)
            weight = weight_desc.load([weight_row, group * B])
            x = x_desc.load([tile * ROWS, group * B])
            if WEIGHTS_FIRST:
                sums += tl.dot(weight, x.T) * scale[None, :]
            else:
                sums += tl.dot(x, weight.T) * scale[:, None]
        columns = column_group * B + inner
        # Each row to its pair's own place, so that the sum over the choices needs no atomics.
        targets = pairs.to(tl.int64) * (HIDDEN_GROUPS * B)
        if WEIGHTS_FIRST:
            out = to_dtype(sums * gates[None, :], out_ptr.dtype.element_ty)
            tl.store(out_ptr + targets[None, :] + columns[:, None], out, mask=inside[None, :])
        else:
            out = to_dtype(sums * gates[:, None], out_ptr.dtype.element_ty)
            tl.store(out_ptr + targets[:, None] + columns[None, :], out, mask=inside[:, None])


def routed_experts_kernel(x: Quantised, choice: Choice, weights: ExpertWeights, *, tiling: ExpertsTiling) -> Tensor:
    """Launch steps 1 to 4 of `teacher.kernels.moe.experts`: BF16 [N, D] from E4M3 [N, D]."""
    num_tokens, top_k = choice.indices_NK.shape
    _, hidden, inner = weights.down_EDI.shape
    device = x.values_MK.device
    if not num_tokens:
        return torch.empty(0, hidden, dtype=torch.bfloat16, device=device)
    grouping = align_kernel(choice.indices_NK, choice.load_E, tiling.rows)
    length, tiles = grouping.pairs_R.numel(), grouping.experts_T.numel()
    num_pairs = num_tokens * top_k
    groups = {"HIDDEN_GROUPS": hidden // BLOCK, "INNER_GROUPS": inner // BLOCK}
    form = {"ROWS": tiling.rows, "WEIGHTS_FIRST": tiling.weights_first}
    values = torch.empty(length, inner, dtype=torch.float8_e4m3fn, device=device)
    scales = empty_scales(length, inner // BLOCK, device)
    _gate_up[(inner // BLOCK, tiles)](
        x.values_MK, x.scale_inv_MG, _blocks(weights.gate_up_E2ID), weights.gate_up_scale_inv,
        grouping.pairs_R, grouping.experts_T, values, scales, num_pairs,
        x.scale_inv_MG.stride(1), scales.stride(1), top_k,
        enable_fp_fusion=False, num_warps=tiling.num_warps, num_stages=tiling.num_stages, **groups, **form,
    )  # fmt: skip
    of_pairs = torch.empty(num_pairs, hidden, dtype=torch.bfloat16, device=device)
    _down[(hidden // BLOCK, tiles)](
        TensorDescriptor.from_tensor(values, [tiling.rows, BLOCK]), scales, _blocks(weights.down_EDI),
        weights.down_scale_inv, grouping.pairs_R, grouping.experts_T, choice.weights_NK, of_pairs,
        num_pairs, scales.stride(1),
        num_warps=tiling.num_warps, num_stages=tiling.down_stages, **groups, **form,
    )  # fmt: skip
    return sum_choices_kernel(of_pairs, top_k, indices_NK=choice.indices_NK)


def _blocks(weight: Tensor) -> TensorDescriptor:
    """128x128 blocks of the experts' weights, one below the other."""
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [BLOCK, BLOCK])
