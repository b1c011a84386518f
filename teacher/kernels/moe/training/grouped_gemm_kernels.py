"""Triton kernels of training's grouped products."""

from __future__ import annotations

import triton
from torch import Tensor

from teacher.kernels.moe.grouped_gemm_kernels import tile_descriptor
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.moe.training.grouped_gemm_triton import k_grouped_bf16, k_grouped_fp8, m_grouped_bf16
from teacher.kernels.moe.training.reference import ColumnQuantised
from teacher.model.fp8 import BLOCK

BF16_STEP = 64  # of K: a row of 128 bytes, the widest swizzle of shared memory


def m_grouped_bf16_kernel(
    a_RK: Tensor, b: Tensor, grouping: Grouping, out: Tensor, transposed: bool, to_pairs: bool, gates_P: Tensor | None
) -> None:
    """Fill `out`, BF16 [R, N] or, `to_pairs`, [P, N]; `b` BF16 [E, N, K] if `transposed`, else [E, K, N]."""
    n_groups, k_groups = out.shape[1] // BLOCK, a_RK.shape[1] // BLOCK
    gates = grouping.load_E if gates_P is None else gates_P.contiguous()
    tile = (BLOCK, BF16_STEP) if transposed else (BF16_STEP, BLOCK)
    m_grouped_bf16[(grouping.experts_T.numel() * ((n_groups + 1) // 2),)](
        tile_descriptor(a_RK, BLOCK, BF16_STEP), tile_descriptor(b.contiguous().flatten(0, 1), *tile),
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
        tile_descriptor(a.values_DR, rows, BLOCK), tile_descriptor(b.values_DR, BLOCK, BLOCK),
        a.scale_inv_TD, b.scale_inv_TD,
        grouping.load_E, out_EMN, a.scale_inv_TD.stride(0), b.scale_inv_TD.stride(0), num_m, num_n,
        E=num_experts, E_PADDED=triton.next_power_of_2(num_experts), ROWS=rows, COLUMNS=BLOCK, ACCUMULATE=accumulate,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def k_grouped_bf16_kernel(a_RM: Tensor, b_RN: Tensor, grouping: Grouping, out_EMN: Tensor, accumulate: bool) -> None:
    """Fill or add to FP32 [E, M, N] the products of BF16 [R, M] and [R, N] over each expert's rows."""
    num_experts, num_m, num_n = out_EMN.shape
    columns = BLOCK if num_n % (2 * BLOCK) else 2 * BLOCK
    k_grouped_bf16[(num_experts * (num_m // BLOCK) * (num_n // columns),)](
        tile_descriptor(a_RM, BF16_STEP, BLOCK), tile_descriptor(b_RN, BF16_STEP, columns), grouping.load_E,
        out_EMN, num_m, num_n,
        E=num_experts, E_PADDED=triton.next_power_of_2(num_experts), ROWS=BLOCK, COLUMNS=columns, STEP=BF16_STEP,
        ACCUMULATE=accumulate, num_warps=8, num_stages=3,
    )  # fmt: skip
