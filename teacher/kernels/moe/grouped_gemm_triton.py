"""The Triton side of `teacher.kernels.moe.training.grouped_gemm`.

Operands come through TMA descriptors. BF16 programs have two accumulators of 128x128 that share a tile of `a`; FP8 ones
have one, since a second beside the products that wait for their scales does not fit the registers. Programs count the
columns first, so that those which run together read one expert's weights.

Shape legend: R rows with padding, T tiles of 128 rows, P (token, choice) pairs, K inner, N columns of one expert,
B = 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from teacher.kernels.arithmetic_triton import to_dtype
from teacher.model.fp8 import BLOCK

B = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["N_GROUPS", "K_GROUPS"])
def m_grouped_fp8(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, experts_ptr, pairs_ptr, gates_ptr, out_ptr,
    num_pairs, a_scale_stride, N_GROUPS, K_GROUPS,
    ROWS: tl.constexpr, TO_PAIRS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """ROWS x 128 of a[R, K] @ b[expert of the rows, N, K]^T, to the rows or, times their gates, to their pairs."""
    row = tl.program_id(0) // N_GROUPS * ROWS
    column_group = tl.program_id(0) % N_GROUPS
    expert = tl.load(experts_ptr + row // B)
    if expert >= 0:
        block = expert * N_GROUPS + column_group
        sums = tl.zeros((ROWS, B), tl.float32)
        a_scale_ptrs = a_scale_ptr + row + tl.arange(0, ROWS)
        b_scale_ptrs = b_scale_ptr + block * K_GROUPS
        for group in range(K_GROUPS):
            a = a_desc.load([row, group * B])
            b = b_desc.load([block * B, group * B])
            scale = tl.load(a_scale_ptrs + group * a_scale_stride) * tl.load(b_scale_ptrs + group)
            sums += tl.dot(a, b.T) * scale[:, None]
        store_rows(out_ptr, sums, row, column_group, N_GROUPS, pairs_ptr, gates_ptr, num_pairs, ROWS, TO_PAIRS, GATED)


@triton.jit
def store_rows(
    out_ptr, values, row, column_group, N_GROUPS, pairs_ptr, gates_ptr, num_pairs,
    ROWS: tl.constexpr, TO_PAIRS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Store FP32 [ROWS, 128] at the rows, or at the pairs that they hold, times their gates."""
    rows = row + tl.arange(0, ROWS)
    columns = column_group * B + tl.arange(0, B)
    if TO_PAIRS:
        pairs = tl.load(pairs_ptr + rows)
        inside = pairs < num_pairs
        if GATED:
            values *= tl.load(gates_ptr + pairs, mask=inside, other=0.0)[:, None]
        places = pairs.to(tl.int64)[:, None] * (N_GROUPS * B) + columns[None, :]
        tl.store(out_ptr + places, to_dtype(values, out_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        places = rows.to(tl.int64)[:, None] * (N_GROUPS * B) + columns[None, :]
        tl.store(out_ptr + places, to_dtype(values, out_ptr.dtype.element_ty))


# --- BF16 -------------------------------------------------------------------------------------------------------------
