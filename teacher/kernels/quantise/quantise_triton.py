"""The Triton side of `quantise`. All are bound by memory: one pass, everything between in registers.

Shape legend: M rows, K columns, I inner width, G = K / 128 tiles a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import (
    INTERPRETED,
    divide,
    reciprocal,
    sigmoid,
    to_dtype,
    to_e4m3,
    widen,
)
from teacher.kernels.quantise import reference as twin
from teacher.kernels.quantise.reference import NormOutput, Quantised, empty_scales
from teacher.model.fp8 import BLOCK, E4M3_MAX, scale_shape

TILE = tl.constexpr(BLOCK)
MAX = tl.constexpr(E4M3_MAX)
LEAST = tl.constexpr(twin.LEAST_MAGNITUDE)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add would round once where the twin rounds twice


class Cut(NamedTuple):
    """Rows and tiles of a row that one program takes, and its warps."""

    rows: int
    groups: int
    num_warps: int


# The fastest on an H200 of those with 8 to 64 numbers a thread.
CUT, SWIGLU_CUT = Cut(16, 2, 4), Cut(1, 8, 1)
FEW_ROWS, FEW_ROWS_CUT = 512, Cut(1, 2, 1)
# Tiles of a row that the norm holds as one, and its warps: for many rows, and for few or with a residual.
NORM_CUT, FEW_ROWS_NORM_CUT = (32, 4), (64, 8)


@triton.jit
def scales_of(largest, UE8M0: tl.constexpr):
    """(what multiplies the quantised values, what multiplies the original ones) of FP32 maxima."""
    scale_inv = tl.math.div_rn(largest, MAX)
    if UE8M0:
        bits = scale_inv.to(tl.int32, bitcast=True)
        scale_inv = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.math.div_rn(1.0, scale_inv)
    else:
        scale = tl.math.div_rn(MAX, largest)
    return scale_inv, scale


@triton.jit
def scales_without_branches(largest, UE8M0: tl.constexpr):
    """`scales_of`, for 1e-4 <= largest < 8e37: no instruction crosses a division's branches, which costs a kernel that
    computes much. One that waits for memory alone is slower this way."""
    if UE8M0 or INTERPRETED:  # the interpreter's fused multiply-add rounds twice
        scale_inv, scale = scales_of(largest, UE8M0)
    else:
        quotient = largest * (1.0 / MAX)
        scale_inv = tl.fma(tl.fma(-quotient, MAX, largest), 1.0 / MAX, quotient)
        inverse = reciprocal(largest)
        scale = MAX * inverse
        scale = tl.fma(tl.fma(-scale, largest, MAX), inverse, scale)
    return scale_inv, scale


@triton.jit
def _quantise(
    x_ptr, values_ptr, scale_ptr, num_rows, num_groups, x_stride, scale_stride,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SWIGLU: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (rows[:, None] < num_rows) & (groups[None, :] < num_groups)
    places = rows[:, None, None] * x_stride + columns[None, :, :]
    x = widen(tl.load(x_ptr + places, mask=inside[:, :, None], other=0.0))
    if SWIGLU:
        up = widen(tl.load(x_ptr + places + num_groups * TILE, mask=inside[:, :, None], other=0.0))
        x = x * sigmoid(x) * up
    largest = tl.maximum(tl.max(tl.abs(x), axis=2), LEAST)
    if SWIGLU:
        scale_inv, scale = scales_without_branches(largest, UE8M0)
    else:
        scale_inv, scale = scales_of(largest, UE8M0)
    values = to_e4m3(x * scale[:, :, None])
    width = num_groups * TILE
    tl.store(values_ptr + rows[:, None, None] * width + columns[None, :, :], values, mask=inside[:, :, None])
    tl.store(scale_ptr + groups[None, :] * scale_stride + rows[:, None], scale_inv, mask=inside)


@triton.jit
def _store_in_place(pointers, values, inside):
    """tl.store of FP32 numbers by the threads that hold them, where it would bring them into another order first,
    through shared memory and with all threads waiting."""
    if INTERPRETED:
        tl.store(pointers, values, mask=inside)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.s32 inside, $3, 0;
            @inside st.global.f32 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,f,r", [pointers.to(tl.int64, bitcast=True), values, inside.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _rms_norm_quantise(
    x_ptr, add_ptr, weight_ptr, residual_ptr, normed_ptr, values_ptr, scale_ptr,
    x_stride, add_stride, scale_stride, eps,
    GROUPS: tl.constexpr, PART: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """A row, in parts of PART tiles so that little is padding."""
    row = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = GROUPS * TILE
    # 1. The row, read once, in registers from here on. Programs that stay and read their next row ahead were slower
    # (31.0 us for 28.3 at 4,096 rows, H200): instructions bind the kernel, not waiting.
    parts = ()
    for begin in tl.static_range(0, width, PART * TILE):
        columns = begin + tl.arange(0, PART)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        inside = columns < width
        part = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
        if ADD:
            added = tl.load(add_ptr + row * add_stride + columns, mask=inside, other=0.0)
            part = to_dtype(widen(part) + widen(added), residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + row * width + columns, part, mask=inside)
        parts = parts + (part,)  # noqa: RUF005 - as Triton can
    # 2. Its mean square. In FP64 the order of the sum does not show in the FP32 result, so the twin's is the same; FP32
    # would gain 2% to 3% (26.6 us for 27.3).
    squares = tl.zeros((PART, TILE), tl.float64)
    for begin in tl.static_range(0, width, PART * TILE):
        x = widen(parts[begin // (PART * TILE)])
        squares += (x * x).to(tl.float64)
    mean_square = (tl.sum(tl.reshape(squares, (PART * TILE,)), axis=0) / width).to(tl.float32)
    # 3. Norm, scales and numbers.
    inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + eps))
    for begin in tl.static_range(0, width, PART * TILE):
        groups = begin // TILE + tl.arange(0, PART)
        columns = groups[:, None] * TILE + tl.arange(0, TILE)[None, :]
        inside = columns < width
        weight = widen(tl.load(weight_ptr + columns, mask=inside, other=0.0))
        normed = widen(parts[begin // (PART * TILE)], inverse) * inverse * weight
        if KEEP:
            tl.store(normed_ptr + row * width + columns, to_dtype(normed, normed_ptr.dtype.element_ty), mask=inside)
        largest = tl.maximum(tl.max(tl.abs(normed), axis=1), LEAST)
        scale_inv, scale = scales_without_branches(largest, UE8M0)
        tl.store(values_ptr + row * width + columns, to_e4m3(normed * scale[:, None]), mask=inside)
        _store_in_place(scale_ptr + groups * scale_stride + row, scale_inv, groups < GROUPS)


@triton.jit
def _quantise_weight(
    weight_ptr, values_ptr, scale_ptr, num_rows, num_columns, weight_stride, num_q,
):  # fmt: skip
    """A tile a program; programs go along rows, as memory does."""
    q, p = tl.program_id(0), tl.program_id(1)
    rows = p.to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = q * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    weight = tl.load(weight_ptr + rows[:, None] * weight_stride + columns[None, :], mask=inside, other=0.0)
    weight = weight.to(tl.float32)
    largest = tl.max(tl.max(tl.abs(weight), axis=1), axis=0)
    scale_inv = tl.maximum(tl.where(largest > 0, tl.math.div_rn(largest, MAX), 1.0), TINY)
    values = to_e4m3(tl.minimum(tl.maximum(divide(weight, scale_inv), -MAX), MAX))
    tl.store(values_ptr + rows[:, None] * num_columns + columns[None, :], values, mask=inside)
    tl.store(scale_ptr + p * num_q + q, scale_inv)


def quantise_kernel(x_MK: Tensor, *, ue8m0: bool = False) -> Quantised:
    """Launch `quantise`: E4M3 [M, K] and FP32 [M, G]."""
    return _launch(x_MK, x_MK.shape[1] // BLOCK, swiglu=False, ue8m0=ue8m0)


def swiglu_quantise_kernel(gate_up_M2I: Tensor, *, ue8m0: bool = False) -> Quantised:
    """Launch `swiglu_quantise`: E4M3 [M, I] and its factors from [M, 2I]."""
    return _launch(gate_up_M2I, gate_up_M2I.shape[1] // (2 * BLOCK), swiglu=True, ue8m0=ue8m0)


def _launch(x: Tensor, groups: int, *, swiglu: bool, ue8m0: bool) -> Quantised:
    x = _rows_contiguous(x)
    num_rows = x.shape[0]
    values = torch.empty(num_rows, groups * BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_scales(num_rows, groups, x.device)
    cut = FEW_ROWS_CUT if num_rows <= FEW_ROWS else SWIGLU_CUT if swiglu else CUT
    grid = (triton.cdiv(num_rows, cut.rows), triton.cdiv(groups, cut.groups))
    if num_rows:
        _quantise[grid](
            x, values, scales, num_rows, groups, x.stride(0), scales.stride(1),
            ROWS=cut.rows, GROUPS=cut.groups, SWIGLU=swiglu, UE8M0=ue8m0, num_warps=cut.num_warps, **EXACT,
        )  # fmt: skip
    return Quantised(values, scales)


def rms_norm_quantise_kernel(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    *,
    add_MK: Tensor | None = None,
    keep_normed: bool = False,
    ue8m0: bool = False,
) -> NormOutput:
    """Launch `rms_norm_quantise` for [M, K] and a weight [K]."""
    x = _rows_contiguous(x_MK)
    added = x if add_MK is None else _rows_contiguous(add_MK)
    num_rows, num_columns = x.shape
    groups = num_columns // BLOCK
    values = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_scales(num_rows, groups, x.device)
    residual = x_MK if add_MK is None else torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    normed = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device) if keep_normed else None
    part, num_warps = NORM_CUT if num_rows > FEW_ROWS and add_MK is None else FEW_ROWS_NORM_CUT
    if num_rows:
        _rms_norm_quantise[(num_rows,)](
            x, added, weight_K.contiguous(), residual, x if normed is None else normed, values, scales,
            x.stride(0), added.stride(0), scales.stride(1), eps,
            GROUPS=groups, PART=min(part, triton.next_power_of_2(groups)), ADD=add_MK is not None, KEEP=keep_normed,
            UE8M0=ue8m0, num_warps=num_warps if num_columns > 2_048 else 4, **EXACT,
        )  # fmt: skip
    return NormOutput(Quantised(values, scales), residual, normed)


def quantise_weight_kernel(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `quantise_weight`: E4M3 [R, C] and FP32 [R / 128, C / 128], rounded up."""
    weight = _rows_contiguous(weight_RC)
    num_rows, num_columns = weight.shape
    num_p, num_q = scale_shape((num_rows, num_columns))
    values = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(num_p, num_q, dtype=torch.float32, device=weight.device)
    _quantise_weight[(num_q, num_p)](
        weight, values, scales, num_rows, num_columns, weight.stride(0), num_q, num_warps=4, **EXACT
    )
    return values, scales


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
