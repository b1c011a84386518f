"""Block-scaled FP8 matrix product: activations in 1x128 tiles, weights in 128x128 blocks, FP32 promotion each 128 of K.

    out[m, n] = sum over g of (x_g[m] . w_g[n]) * scale_x[m, g] * scale_w[n / 128, g]      (DeepSeek-V3 s.3.3.2)

Within a group of 128 the tensor cores add up; between groups, FP32 adds scaled sums, so that their short accumulators
never see more than 128 products. `GemmTiling` says how a shape is cut; which one is fastest is measured, not guessed:
`make tune` writes `tables/<gpu>.json`, which also names the shapes at which cuBLAS is faster still.

Shape legend: M rows (tokens), N columns (outputs), K inner, G = K / 128, P = ceil(N / 128).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.dense import tables
from teacher.kernels.dense.reference import MANY_ROWS, GemmTiling, block_gemm_twin
from teacher.kernels.device import runs_kernels
from teacher.kernels.quantise.reference import Quantised, num_groups
from teacher.model.fp8 import BLOCK, scale_shape

LIBRARY_ROWS = 4  # cuBLASLt takes multiples of it


def block_gemm(
    x: Quantised,
    weight_NK: Tensor,
    scale_inv_PG: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tiling: GemmTiling | None = None,
) -> Tensor:
    """[M, N] in `dtype`. Raises ValueError for shapes that do not belong together.

    `tiling` is the caller's choice for the kernel; by default the fastest measured one, or cuBLAS where that won.
    """
    num_rows, num_inner = x.values_MK.shape
    groups = num_groups(num_inner)
    expected = (weight_NK.shape[0], num_inner), scale_shape((weight_NK.shape[0], num_inner)), (num_rows, groups)
    got = tuple(weight_NK.shape), tuple(scale_inv_PG.shape), tuple(x.scale_inv_MG.shape)
    if got != expected:
        raise ValueError(f"weight, its scales and the activations' scales must be {expected}, got {got}")
    if runs_kernels(x.values_MK):
        from teacher.kernels.dense.gemm_triton import block_gemm_kernel

        if tiling is None:
            tiling, library = fastest_gemm(x.values_MK.device, num_rows, *weight_NK.shape)
            if library and dtype == torch.bfloat16 and num_rows % LIBRARY_ROWS == 0:
                return _library_gemm(x, weight_NK, scale_inv_PG)
        return block_gemm_kernel(x, weight_NK, scale_inv_PG, dtype=dtype, tiling=tiling)
    return block_gemm_twin(x, weight_NK, scale_inv_PG, dtype=dtype)


class FastestGemm(NamedTuple):
    """Our fastest tiling for a shape, and whether cuBLAS is faster than it."""

    tiling: GemmTiling
    library: bool


@cache
def fastest_gemm(device: torch.device, num_rows: int, num_columns: int, num_inner: int) -> FastestGemm:
    """Look up what this GPU measured for the nearest number of rows that is not smaller, or else for the largest."""
    measured = tables.gemm_shapes(device).get(f"{num_columns}x{num_inner}")
    if not measured:
        return FastestGemm(default_tiling(num_rows, num_columns, num_inner // BLOCK), library=False)
    rows = min((at for at in measured if at >= num_rows), default=max(measured))
    entry = measured[rows]
    return FastestGemm(GemmTiling(**entry["plan"]), library=entry["library"])


def _library_gemm(x: Quantised, weight_NK: Tensor, scale_inv_PG: Tensor) -> Tensor:
    """cuBLASLt's blocks of 1x128 by 128x128 (Hopper, CUDA 12.9 or later)."""
    factors = x.scale_inv_MG, scale_inv_PG.t()
    return torch._scaled_mm(x.values_MK, weight_NK.t(), *factors, out_dtype=torch.bfloat16)


def default_tiling(num_rows: int, num_columns: int, groups: int) -> GemmTiling:
    """A tiling for shapes that nobody has measured: enough tiles for a large GPU's multiprocessors.

    Tiles are small enough for two programs a multiprocessor, so that one loads while the other multiplies.
    """
    if num_rows > 64:
        return MANY_ROWS
    rows = max(16, 1 << (num_rows - 1).bit_length())
    columns = 64 if rows == 64 else 128
    tiles = -(-num_columns // columns)
    splits = 1
    while tiles * splits < 128 and splits * 8 <= groups:
        splits *= 2
    return GemmTiling(rows=rows, columns=columns, splits=splits, weights_first=True, loader=True)
