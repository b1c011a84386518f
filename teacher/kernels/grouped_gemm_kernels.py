"""Launches of the grouped products: descriptors, grids and tiles.

On Hopper the FP8 product that stays with its rows runs in Gluon (`teacher.kernels.gemm_gluon`); all others run in plain
Triton (`teacher.kernels.grouped_gemm_triton`), as do the scattered ones, since Gluon's stores through pointers to the
pairs cost more than its products gain.

Shape legend: R rows with padding, E routed experts, M and N columns, K inner.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.grouped import Grouping
from teacher.kernels.grouped_gemm_triton import k_grouped_bf16, k_grouped_fp8, m_grouped_bf16, m_grouped_fp8
from teacher.kernels.grouped_quantise import ColumnQuantised
from teacher.kernels.quantise import Quantised
from teacher.model.fp8 import BLOCK

BF16_STEP = 64  # of K: a row of 128 bytes, the widest swizzle of shared memory


def _tiles(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def m_grouped_fp8_kernel(
    a: Quantised, b_ENK: Tensor, b_scale_inv: Tensor, grouping: Grouping, out: Tensor, to_pairs: bool,
    gates_P: Tensor | None,
) -> None:  # fmt: skip
    """Fill `out`, BF16 [R, N] or, `to_pairs`, [P, N], with rows E4M3 [R, K] times their experts' E4M3 [E, N, K]."""
    if not to_pairs and runs_hopper_kernels(out.device):
        from teacher.kernels.gemm_gluon import grouped_gemm_hopper

        grouped_gemm_hopper(*a, b_ENK.contiguous(), b_scale_inv.contiguous(), out, experts_T=grouping.experts_T)
        return
    _, num_columns, num_inner = b_ENK.shape
    n_groups, k_groups = num_columns // BLOCK, num_inner // BLOCK
    gates = grouping.load_E if gates_P is None else gates_P.contiguous()
    m_grouped_fp8[(grouping.experts_T.numel() * n_groups,)](
        _tiles(a.values_MK, BLOCK, BLOCK), _tiles(b_ENK.contiguous().flatten(0, 1), BLOCK, BLOCK), a.scale_inv_MG,
        b_scale_inv.contiguous(), grouping.experts_T, grouping.pairs_R, gates, out,
        out.shape[0], a.scale_inv_MG.stride(1), n_groups, k_groups,
        ROWS=BLOCK, TO_PAIRS=to_pairs, GATED=gates_P is not None, num_warps=8, num_stages=4,
    )  # fmt: skip


def m_grouped_bf16_kernel(
    a_RK: Tensor, b: Tensor, grouping: Grouping, out: Tensor, transposed: bool, to_pairs: bool, gates_P: Tensor | None
) -> None:
    """Fill `out`, BF16 [R, N] or, `to_pairs`, [P, N]; `b` BF16 [E, N, K] if `transposed`, else [E, K, N]."""
    n_groups, k_groups = out.shape[1] // BLOCK, a_RK.shape[1] // BLOCK
    gates = grouping.load_E if gates_P is None else gates_P.contiguous()
    tile = (BLOCK, BF16_STEP) if transposed else (BF16_STEP, BLOCK)
    m_grouped_bf16[(grouping.experts_T.numel() * ((n_groups + 1) // 2),)](
        _tiles(a_RK, BLOCK, BF16_STEP), _tiles(b.contiguous().flatten(0, 1), *tile),
        grouping.experts_T, grouping.pairs_R, gates, out, out.shape[0], n_groups, k_groups,
        ROWS=BLOCK, STEP=BF16_STEP, TRANSPOSED=not transposed, TO_PAIRS=to_pairs, GATED=gates_P is not None,
        num_warps=8, num_stages=4 if transposed else 3,  # each the faster on an H100: 564 to 511, 576 to 480 TFLOP/s
    )  # fmt: skip


def k_grouped_fp8_kernel(
    a: ColumnQuantised, b: ColumnQuantised, grouping: Grouping, out_EMN: Tensor, accumulate: bool
) -> None:
    """Fill or add to FP32 [E, M, N] the products of E4M3 [M, R] and [N, R] over each expert's rows."""
    num_experts, num_m, num_n = out_EMN.shape
    rows = BLOCK // 2
    k_grouped_fp8[(num_experts * (num_m // rows) * (num_n // BLOCK),)](
        _tiles(a.values_DR, rows, BLOCK), _tiles(b.values_DR, BLOCK, BLOCK), a.scale_inv_TD, b.scale_inv_TD,
        grouping.load_E, out_EMN, a.scale_inv_TD.stride(0), b.scale_inv_TD.stride(0), num_m, num_n,
        E=num_experts, E_PADDED=triton.next_power_of_2(num_experts), ROWS=rows, COLUMNS=BLOCK, ACCUMULATE=accumulate,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def k_grouped_bf16_kernel(a_RM: Tensor, b_RN: Tensor, grouping: Grouping, out_EMN: Tensor, accumulate: bool) -> None:
    """Fill or add to FP32 [E, M, N] the products of BF16 [R, M] and [R, N] over each expert's rows."""
    num_experts, num_m, num_n = out_EMN.shape
    columns = BLOCK if num_n % (2 * BLOCK) else 2 * BLOCK
    k_grouped_bf16[(num_experts * (num_m // BLOCK) * (num_n // columns),)](
        _tiles(a_RM, BF16_STEP, BLOCK), _tiles(b_RN, BF16_STEP, columns), grouping.load_E, out_EMN, num_m, num_n,
        E=num_experts, E_PADDED=triton.next_power_of_2(num_experts), ROWS=BLOCK, COLUMNS=columns, STEP=BF16_STEP,
        ACCUMULATE=accumulate, num_warps=8, num_stages=3,
    )  # fmt: skip
