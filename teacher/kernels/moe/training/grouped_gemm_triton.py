"""Grouped products of training: BF16 by rows, BF16 and FP8 by tokens (gradients of weights)."""

from __future__ import annotations

import triton
import triton.language as tl

from teacher.kernels.arithmetic_triton import dot
from teacher.kernels.moe.grouped_gemm_triton import B, store_rows


@triton.jit
def k_grouped_fp8(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, load_ptr, out_ptr, a_scale_stride, b_scale_stride, num_m, num_n,
    E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of a[M, R_e] @ b[N, R_e]^T for one expert's rows, both operands in 1x128 tiles along them."""
    tiles_n = num_n // COLUMNS
    tiles = num_m // ROWS * tiles_n
    expert = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles // tiles_n * ROWS
    n = tl.program_id(0) % tiles_n * COLUMNS
    experts = tl.arange(0, E_PADDED)
    # This expert's rows, in tiles of 128, from the loads: the host knows none of them.
    tiles_E = (tl.load(load_ptr + experts, mask=experts < E, other=0) + B - 1) // B
    begin = tl.sum(tl.where(experts < expert, tiles_E, 0), axis=0)
    end = begin + tl.sum(tl.where(experts == expert, tiles_E, 0), axis=0)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    a_scale_ptr += m + tl.arange(0, ROWS)
    b_scale_ptr += n + tl.arange(0, COLUMNS)
    for group in range(begin, end):
        a = a_desc.load([m, group * B])
        b = b_desc.load([n, group * B])
        a_scale = tl.load(a_scale_ptr + group * a_scale_stride)
        b_scale = tl.load(b_scale_ptr + group * b_scale_stride)
        sums += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    rows = (expert.to(tl.int64) * num_m + m) + tl.arange(0, ROWS)
    out_ptr += rows[:, None] * num_n + (n + tl.arange(0, COLUMNS))[None, :]
    if ACCUMULATE:
        sums += tl.load(out_ptr)
    tl.store(out_ptr, sums)


@triton.jit(do_not_specialize=["N_GROUPS", "K_GROUPS"])
def m_grouped_bf16(
    a_desc, b_desc, experts_ptr, pairs_ptr, gates_ptr, out_ptr, num_pairs, N_GROUPS, K_GROUPS,
    ROWS: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr, TO_PAIRS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Do as `m_grouped_fp8`; TRANSPOSED multiplies by b[expert, K, N] as it lies (the gradient of the input)."""
    tiles_n = (N_GROUPS + 1) // 2
    row = tl.program_id(0) // tiles_n * ROWS
    column_group = tl.program_id(0) % tiles_n * 2
    expert = tl.load(experts_ptr + row // B)
    if expert >= 0:
        has_other = column_group + 1 < N_GROUPS
        other_group = tl.where(has_other, column_group + 1, column_group)
        first, second = tl.zeros((ROWS, B), tl.float32), tl.zeros((ROWS, B), tl.float32)
        for k in range(0, K_GROUPS * B, STEP):
            a = a_desc.load([row, k])
            if TRANSPOSED:
                b = b_desc.load([expert * K_GROUPS * B + k, column_group * B])
                other = b_desc.load([expert * K_GROUPS * B + k, other_group * B])
            else:
                b = b_desc.load([(expert * N_GROUPS + column_group) * B, k]).T
                other = b_desc.load([(expert * N_GROUPS + other_group) * B, k]).T
            first = dot(a, b, first)
            second = dot(a, other, second)
        store_rows(out_ptr, first, row, column_group, N_GROUPS, pairs_ptr, gates_ptr, num_pairs, ROWS, TO_PAIRS, GATED)
        if has_other:
            store_rows(
                out_ptr, second, row, column_group + 1, N_GROUPS, pairs_ptr, gates_ptr, num_pairs, ROWS, TO_PAIRS, GATED
            )


@triton.jit
def k_grouped_bf16(
    a_desc, b_desc, load_ptr, out_ptr, num_m, num_n,
    E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of a[R_e, M]^T @ b[R_e, N] for one expert's rows."""
    tiles_n = num_n // COLUMNS
    tiles = num_m // ROWS * tiles_n
    expert = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles // tiles_n * ROWS
    n = tl.program_id(0) % tiles_n * COLUMNS
    experts = tl.arange(0, E_PADDED)
    tiles_E = (tl.load(load_ptr + experts, mask=experts < E, other=0) + B - 1) // B
    begin = tl.sum(tl.where(experts < expert, tiles_E, 0), axis=0) * B
    end = begin + tl.sum(tl.where(experts == expert, tiles_E, 0), axis=0) * B
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(begin, end, STEP):
        a = a_desc.load([row, m])
        b = b_desc.load([row, n])
        sums = dot(a.T, b, sums)
    rows = (expert.to(tl.int64) * num_m + m) + tl.arange(0, ROWS)
    out_ptr += rows[:, None] * num_n + (n + tl.arange(0, COLUMNS))[None, :]
    if ACCUMULATE:
        sums += tl.load(out_ptr)
    tl.store(out_ptr, sums)
