"""The Triton side of `grouped_quantise`: tiles of 128x128, so that one read serves both directions.

Scales of columns lie [T, columns]: what `k_grouped_fp8` reads for one step of K is contiguous.

Shape legend: R rows with padding, T tiles of 128 rows, N tokens, D hidden, I expert intermediate, E routed experts,
G groups of 128 columns, B = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import sigmoid, to_e4m3
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.moe.training.reference import BothWays, ColumnQuantised, QuantisedSwigluGradients, TrainingWeight
from teacher.kernels.quantise import reference as quantise_twin
from teacher.kernels.quantise.quantise_triton import quantise_weight_kernel
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.model.fp8 import BLOCK, E4M3_MAX

B = tl.constexpr(BLOCK)
MAX = tl.constexpr(E4M3_MAX)
LEAST = tl.constexpr(quantise_twin.LEAST_MAGNITUDE)
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add would round once where the twin rounds twice


@triton.jit
def _store_rowwise(x, values_ptr, scale_ptr, rows, column_group, num_groups, scale_stride):
    """Quantise [128, 128] in tiles of 1x128, at `column_group` of [R, num_groups * 128]."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST)
    values = to_e4m3(x * tl.math.div_rn(MAX, largest)[:, None])
    columns = column_group * B + tl.arange(0, B)
    tl.store(values_ptr + rows.to(tl.int64)[:, None] * (num_groups * B) + columns[None, :], values)
    tl.store(scale_ptr + column_group * scale_stride + rows, tl.math.div_rn(largest, MAX))


@triton.jit
def _store_columnwise(x, values_ptr, scale_ptr, tile, column_group, num_groups, num_rows):
    """Quantise [128, 128] in tiles of 128x1, transposed, at `tile` of [num_groups * 128, R]."""
    # Along the rows, which become the columns: Hopper's FP8 tensor cores take operands with K innermost alone.
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
    values = to_e4m3(x * tl.math.div_rn(MAX, largest)[None, :])
    columns = column_group * B + tl.arange(0, B)
    rows = tile * B + tl.arange(0, B)
    tl.store(values_ptr + columns.to(tl.int64)[:, None] * num_rows + rows[None, :], tl.trans(values))
    tl.store(scale_ptr + tile.to(tl.int64) * (num_groups * B) + columns, tl.math.div_rn(largest, MAX))


@triton.jit
def _gather_quantise(
    x_ptr, pairs_ptr, experts_ptr, values_ptr, scale_ptr, columns_ptr, column_scale_ptr,
    num_pairs, top_k, num_rows, num_groups, scale_stride, ROWWISE: tl.constexpr, COLUMNWISE: tl.constexpr,
):  # fmt: skip
    group, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(experts_ptr + tile) >= 0:
        rows = tile * B + tl.arange(0, B)
        pairs = tl.load(pairs_ptr + rows)
        places = (pairs // top_k).to(tl.int64)[:, None] * (num_groups * B) + (group * B + tl.arange(0, B))[None, :]
        x = tl.load(x_ptr + places, mask=(pairs < num_pairs)[:, None], other=0.0).to(tl.float32)
        if ROWWISE:
            _store_rowwise(x, values_ptr, scale_ptr, rows, group, num_groups, scale_stride)
        if COLUMNWISE:
            _store_columnwise(x, columns_ptr, column_scale_ptr, tile, group, num_groups, num_rows)


@triton.jit
def _load_scaled(values_ptr, scale_ptr, rows, column_group, num_groups, scale_stride):
    columns = column_group * B + tl.arange(0, B)
    values = tl.load(values_ptr + rows.to(tl.int64)[:, None] * (num_groups * B) + columns[None, :])
    return values.to(tl.float32) * tl.load(scale_ptr + column_group * scale_stride + rows)[:, None]


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, gate_up_scale_ptr, pairs_ptr, experts_ptr, gates_ptr,
    values_ptr, scale_ptr, columns_ptr, column_scale_ptr, inner_ptr, inner_scale_ptr, partial_ptr,
    num_pairs, num_rows, num_groups, scale_stride,
):  # fmt: skip
    """A program for each of three results of a tile: all at once would not fit the registers; the L2 reads once."""
    part, group, tile = tl.program_id(0) % 3, tl.program_id(0) // 3, tl.program_id(1)
    if tl.load(experts_ptr + tile) >= 0:
        rows = tile * B + tl.arange(0, B)
        pairs = tl.load(pairs_ptr + rows)
        gates = tl.load(gates_ptr + pairs, mask=pairs < num_pairs, other=0.0)
        places = rows.to(tl.int64)[:, None] * (num_groups * B) + (group * B + tl.arange(0, B))[None, :]
        grad = tl.load(grad_ptr + places).to(tl.float32)
        both = 2 * num_groups
        gate = _load_scaled(gate_up_ptr, gate_up_scale_ptr, rows, group, both, scale_stride)
        share = sigmoid(gate)
        if part == 0:
            up = _load_scaled(gate_up_ptr, gate_up_scale_ptr, rows, num_groups + group, both, scale_stride)
            inner = gate * share * up
            tl.store(partial_ptr + group * num_rows + rows, tl.sum(grad * inner, axis=1))
            _store_columnwise(inner * gates[:, None], inner_ptr, inner_scale_ptr, tile, group, num_groups, num_rows)
        elif part == 1:
            grad_up = grad * gates[:, None] * (gate * share)
            _store_rowwise(grad_up, values_ptr, scale_ptr, rows, num_groups + group, both, scale_stride)
            _store_columnwise(grad_up, columns_ptr, column_scale_ptr, tile, num_groups + group, both, num_rows)
        else:
            up = _load_scaled(gate_up_ptr, gate_up_scale_ptr, rows, num_groups + group, both, scale_stride)
            grad_gate = grad * gates[:, None] * up * (share * (1.0 + gate * (1.0 - share)))
            _store_rowwise(grad_gate, values_ptr, scale_ptr, rows, group, both, scale_stride)
            _store_columnwise(grad_gate, columns_ptr, column_scale_ptr, tile, group, both, num_rows)


@triton.jit
def _turn(values_ptr, turned_ptr, num_rows, num_columns):
    """Bytes [E, rows, columns] to [E, columns, rows]."""
    rows, columns = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    start = tl.program_id(2).to(tl.int64) * num_rows * num_columns
    values = tl.load(values_ptr + start + rows.to(tl.int64)[:, None] * num_columns + columns[None, :])
    tl.store(turned_ptr + start + columns.to(tl.int64)[:, None] * num_rows + rows[None, :], tl.trans(values))


def _empty_columns(width: int, num_rows: int, device: torch.device) -> ColumnQuantised:
    values = torch.empty(width, num_rows, dtype=torch.float8_e4m3fn, device=device)
    return ColumnQuantised(values, torch.empty(num_rows // BLOCK, width, device=device))


def _empty_rows(num_rows: int, width: int, device: torch.device) -> Quantised:
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    return Quantised(values, empty_scales(num_rows, width // BLOCK, device))


def gather_quantise_kernel(
    x_ND: Tensor, grouping: Grouping, top_k: int, *, rowwise: bool, columnwise: bool
) -> BothWays:
    """Launch `gather_quantise`: E4M3 [R, D], its transpose [D, R], or both, from BF16 [N, D]."""
    num_rows, width = grouping.pairs_R.numel(), x_ND.shape[1]
    rows = _empty_rows(num_rows, width, x_ND.device) if rowwise else None
    columns = _empty_columns(width, num_rows, x_ND.device) if columnwise else None
    _gather_quantise[(width // BLOCK, num_rows // BLOCK)](
        x_ND, grouping.pairs_R, grouping.experts_T, *(rows or columns), *(columns or rows),
        x_ND.shape[0] * top_k, top_k, num_rows, width // BLOCK, rows.scale_inv_MG.stride(1) if rows else 0,
        ROWWISE=rowwise, COLUMNWISE=columnwise, num_warps=8, **EXACT,
    )  # fmt: skip
    return BothWays(rows, columns)


def swiglu_backward_quantise_kernel(
    grad_RI: Tensor, gate_up: Quantised, gates_P: Tensor, grouping: Grouping
) -> QuantisedSwigluGradients:
    """Launch `swiglu_backward_quantise` for BF16 [R, I] and a quantised gate and up [R, 2I]."""
    num_rows, inner = grad_RI.shape
    rows = _empty_rows(num_rows, 2 * inner, grad_RI.device)
    columns, weighted = (_empty_columns(width, num_rows, grad_RI.device) for width in (2 * inner, inner))
    # Zeros, since the rows after the last expert's are summed with the others.
    partial = torch.zeros(inner // BLOCK, num_rows, device=grad_RI.device)
    _swiglu_backward[(3 * (inner // BLOCK), num_rows // BLOCK)](
        grad_RI, *gate_up, grouping.pairs_R, grouping.experts_T, gates_P, *rows, *columns, *weighted, partial,
        gates_P.numel(), num_rows, inner // BLOCK, rows.scale_inv_MG.stride(1), num_warps=8, **EXACT,
    )  # fmt: skip
    return QuantisedSwigluGradients(rows, columns, weighted, partial.sum(dim=0))


def quantise_expert_weight_kernel(weight_ENK: Tensor) -> TrainingWeight:
    """The transposed copy has a launch of its own. In one with the plain copy, ptxas 12.9 mixed up the bytes of the two
    (github.com/triton-lang/triton/issues/11111): it stored numbers fresh from their conversion to E4M3 both ways."""
    num_experts, num_rows, num_columns = weight_ENK.shape
    values, scales = quantise_weight_kernel(weight_ENK.flatten(0, 1))
    values, scales = values.unflatten(0, (num_experts, -1)), scales.unflatten(0, (num_experts, -1))
    turned = torch.empty(num_experts, num_columns, num_rows, dtype=values.dtype, device=values.device)
    _turn[(num_rows // BLOCK, num_columns // BLOCK, num_experts)](
        values.view(torch.uint8), turned.view(torch.uint8), num_rows, num_columns, num_warps=8
    )
    turned_scales = scales.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return TrainingWeight(values, scales, turned, turned_scales)
