"""The Triton side of `teacher.kernels.dense.gemm`.

A program computes one tile over one part of K. With several parts, each writes its FP32 sums to a workspace, and the
last program to arrive at the tile adds all of them in their order: the result does not depend on which came first.
Programs wait for no other.

Shape legend: M rows (tokens), N columns (outputs), K inner, S parts of K, B = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.kernels.arithmetic_triton import to_dtype
from teacher.kernels.dense.gemm_arrivals import arrival_counters
from teacher.kernels.dense.reference import HOPPER_COLUMNS, MANY_ROWS_PLAIN, GemmTiling
from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK

B = tl.constexpr(BLOCK)
TILES_A_GROUP = 8  # tiles of M that share a tile of N in the L2 before the next N


@triton.jit(do_not_specialize=["num_rows"])
def _gemm(
    x_desc, weight_desc, x_scale_ptr, weight_scale_ptr, out_ptr, parts_ptr, arrivals_ptr, num_rows, num_columns,
    num_groups, groups_a_part, x_scale_stride, tiles_m, tiles_n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    # Bands of TILES tiles of M: programs that run at one time share tiles of N and of M in the L2.
    first = tile // (TILES * tiles_n) * TILES
    in_group = min(tiles_m - first, TILES)
    tile_m = first + tile % (TILES * tiles_n) % in_group
    tile_n = tile % (TILES * tiles_n) // in_group
    rows = tile_m * ROWS + tl.arange(0, ROWS)
    columns = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    inside_m, inside_n = rows < num_rows, columns < num_columns
    weight_scale_row = weight_scale_ptr + tile_n * COLUMNS // B * num_groups
    if WEIGHTS_FIRST:
        sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = part * groups_a_part
    end = min(begin + groups_a_part, num_groups)
    # The factors are loaded a step ahead: unlike the tiles, nothing else hides their way from memory.
    x_scale = tl.load(x_scale_ptr + begin * x_scale_stride + rows, mask=inside_m, other=0.0)
    weight_scale = tl.load(weight_scale_row + begin)
    for group in range(begin, end):
        scale = x_scale * weight_scale
        ahead = min(group + 1, end - 1)
        x_scale = tl.load(x_scale_ptr + ahead * x_scale_stride + rows, mask=inside_m, other=0.0)
        weight_scale = tl.load(weight_scale_row + ahead)
        weight = weight_desc.load([tile_n * COLUMNS, group * B])
        x = x_desc.load([tile_m * ROWS, group * B])
        if WEIGHTS_FIRST:
            sums += tl.dot(weight, x.T) * scale[None, :]
        else:
            sums += tl.dot(x, weight.T) * scale[:, None]
    # Alone with its tile, a program has all of the sum; else the last one to arrive there has.
    complete = True
    if SPLITS > 1:
        parts_ptr += tile.to(tl.int64) * SPLITS * ROWS * COLUMNS
        sums, complete = _add_parts(sums, part, parts_ptr, arrivals_ptr + tile, SPLITS)
    if complete:
        if WEIGHTS_FIRST:
            places = rows[None, :].to(tl.int64) * num_columns + columns[:, None]
            inside = inside_m[None, :] & inside_n[:, None]
        else:
            places = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
            inside = inside_m[:, None] & inside_n[None, :]
        tl.store(out_ptr + places, to_dtype(sums, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_parts(sums, part, parts_ptr, arrivals_ptr, SPLITS: tl.constexpr):
    """(the sum over all parts, True) for the last program that comes here, (its own sums, False) for the others.

    The barrier puts every warp's stores before the count, which releases them and acquires those of the others; past
    the L1, which might hold another launch's parts.
    """
    places = tl.arange(0, sums.shape[0])[:, None] * sums.shape[1] + tl.arange(0, sums.shape[1])[None, :]
    SIZE: tl.constexpr = sums.shape[0] * sums.shape[1]
    # 1. Each part to its place, past the L1.
    tl.store(parts_ptr + part * SIZE + places, sums, cache_modifier=".cg")
    # 2. All warps have stored; then one thread counts.
    tl.debug_barrier()
    complete = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1
    if complete:
        # 3. The last to arrive adds all parts in their order, whichever came last: results repeat to the bit.
        sums = tl.zeros_like(sums)
        for one in tl.static_range(SPLITS):
            sums += tl.load(parts_ptr + one * SIZE + places, cache_modifier=".cg")
        tl.store(arrivals_ptr, 0)  # as the next launch expects it
    return sums, complete


def block_gemm_kernel(
    x: Quantised, weight_NK: Tensor, scale_inv_PG: Tensor, *, dtype: torch.dtype, tiling: GemmTiling
) -> Tensor:
    """Launch the form that `tiling` names: [M, N] in `dtype`. Raises ValueError for columns that do not divide 128."""
    if tiling.columns != HOPPER_COLUMNS and BLOCK % tiling.columns:
        raise ValueError(f"a tile's columns must divide {BLOCK}, got {tiling.columns}")
    num_rows, num_columns = x.values_MK.shape[0], weight_NK.shape[0]
    values, weight, scales = x.values_MK.contiguous(), weight_NK.contiguous(), scale_inv_PG.contiguous()
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=values.device)
    if not num_rows:
        return out
    if tiling.columns == HOPPER_COLUMNS:
        if runs_hopper_kernels(values.device):
            from teacher.kernels.dense.sm90_gemm_many import block_gemm_hopper

            block_gemm_hopper(values, x.scale_inv_MG, weight, scales, out)
            return out
        tiling = MANY_ROWS_PLAIN
    if tiling.loader and runs_hopper_kernels(values.device):
        from teacher.kernels.dense.sm90_gemm_few import few_rows_gemm_hopper

        few_rows_gemm_hopper(Quantised(values, x.scale_inv_MG), weight, scales, out, tiling)
        return out
    groups = scale_inv_PG.shape[1]
    groups_a_part = -(-groups // tiling.splits)
    splits = -(-groups // groups_a_part)
    tiles_m, tiles_n = triton.cdiv(num_rows, tiling.rows), triton.cdiv(num_columns, tiling.columns)
    parts = arrivals = None
    if splits > 1:
        parts = torch.empty(tiles_m * tiles_n * splits, tiling.rows * tiling.columns, device=values.device)
        arrivals = arrival_counters(values.device, tiles_m * tiles_n)
    _gemm[(tiles_m * tiles_n, splits)](
        TensorDescriptor.from_tensor(values, [tiling.rows, BLOCK]),
        TensorDescriptor.from_tensor(weight, [tiling.columns, BLOCK]),
        x.scale_inv_MG, scales, out, parts, arrivals, num_rows, num_columns, groups, groups_a_part,
        x.scale_inv_MG.stride(1), tiles_m, tiles_n,
        ROWS=tiling.rows, COLUMNS=tiling.columns, WEIGHTS_FIRST=tiling.weights_first, SPLITS=splits,
        TILES=TILES_A_GROUP, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out
