"""Launches of the grouped products: descriptors, grids and tiles.

On Hopper the FP8 product that stays with its rows runs in Gluon (`teacher.kernels.dense.sm90_gemm_many`); all others
run in plain Triton (`teacher.kernels.moe.grouped_gemm_triton`), as do the scattered ones, since Gluon's stores through
pointers to the pairs cost more than its products gain.

Shape legend: R rows with padding, E routed experts, M and N columns, K inner.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.moe.grouped_gemm_triton import m_grouped_fp8
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK


def tile_descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def m_grouped_fp8_kernel(
    a: Quantised, b_ENK: Tensor, b_scale_inv: Tensor, grouping: Grouping, out: Tensor, to_pairs: bool,
    gates_P: Tensor | None,
) -> None:  # fmt: skip
    """Fill `out`, BF16 [R, N] or, `to_pairs`, [P, N], with rows E4M3 [R, K] times their experts' E4M3 [E, N, K]."""
    if not to_pairs and runs_hopper_kernels(out.device):
        from teacher.kernels.dense.sm90_gemm_many import grouped_gemm_hopper

        grouped_gemm_hopper(*a, b_ENK.contiguous(), b_scale_inv.contiguous(), out, experts_T=grouping.experts_T)
        return
    _, num_columns, num_inner = b_ENK.shape
    n_groups, k_groups = num_columns // BLOCK, num_inner // BLOCK
    gates = grouping.load_E if gates_P is None else gates_P.contiguous()
    m_grouped_fp8[(grouping.experts_T.numel() * n_groups,)](
        tile_descriptor(a.values_MK, BLOCK, BLOCK), tile_descriptor(b_ENK.contiguous().flatten(0, 1), BLOCK, BLOCK),
        a.scale_inv_MG,
        b_scale_inv.contiguous(), grouping.experts_T, grouping.pairs_R, gates, out,
        out.shape[0], a.scale_inv_MG.stride(1), n_groups, k_groups,
        ROWS=BLOCK, TO_PAIRS=to_pairs, GATED=gates_P is not None, num_warps=8, num_stages=4,
    )  # fmt: skip
