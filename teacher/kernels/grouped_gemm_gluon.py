"""The m-grouped FP8 product for Hopper in Gluon: four warps load through TMA, two groups of four multiply.

A consumer owns 64 rows of a 128x256 tile, as two accumulators of 64x128. While one scales and adds its 128 of K in
FP32, the other keeps the tensor cores busy. Programs are persistent and count the columns first, so that those which
run together read one expert's weights. `teacher.kernels.grouped_gemm_triton` is the same in plain Triton.

Shape legend: R rows with padding, T tiles of 128 rows, P (token, choice) pairs, K inner, N columns of one expert,
B = 128.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from teacher.model.fp8 import BLOCK

B = gl.constexpr(BLOCK)
HALF = gl.constexpr(BLOCK // 2)  # rows of a consumer
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]))
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
STORE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _where(tile, N_GROUPS):
    """(first row, first column group, second column group) of a tile."""
    tiles_n = (N_GROUPS + 1) // 2
    column_group = tile % tiles_n * 2
    other = gl.minimum(column_group + 1, N_GROUPS - 1)
    return tile // tiles_n * B, column_group, other


@gluon.jit
def _load_m_grouped(
    a_desc, b_desc, experts_ptr, a_bufs, b_bufs, full, empty, num_tiles, N_GROUPS, K_GROUPS, STAGES: gl.constexpr
):
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column_group, other = _where(tile, N_GROUPS)
        expert = gl.load(experts_ptr + row // B)
        if expert >= 0:
            for group in range(K_GROUPS):
                slot = count % STAGES
                mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                ready = full.index(slot)
                mbarrier.expect(ready, 3 * B * B)
                k = group * B
                tma.async_copy_global_to_shared(a_desc, [row, k], ready, a_bufs.index(2 * slot))
                tma.async_copy_global_to_shared(a_desc, [row + HALF, k], ready, a_bufs.index(2 * slot + 1))
                tma.async_copy_global_to_shared(
                    b_desc, [(expert * N_GROUPS + column_group) * B, k], ready, b_bufs.index(2 * slot)
                )
                tma.async_copy_global_to_shared(
                    b_desc, [(expert * N_GROUPS + other) * B, k], ready, b_bufs.index(2 * slot + 1)
                )
                count += 1


@gluon.jit
def _multiply_m_grouped(
    a_scale_ptr, b_scale_ptr, experts_ptr, pairs_ptr, gates_ptr, out_ptr, a_bufs, b_bufs, full, empty,
    num_tiles, num_pairs, a_scale_stride, N_GROUPS, K_GROUPS,
    WHICH: gl.constexpr, STAGES: gl.constexpr, TO_PAIRS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    count = 0
    zeros = gl.zeros((HALF, B), gl.float32, MMA)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column_group, other = _where(tile, N_GROUPS)
        row += WHICH * HALF
        expert = gl.load(experts_ptr + row // B)
        if expert >= 0:
            a_scales = a_scale_ptr + row + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
            b_scales = b_scale_ptr + (expert * N_GROUPS + column_group) * K_GROUPS
            o_scales = b_scale_ptr + (expert * N_GROUPS + other) * K_GROUPS
            first = zeros
            second = zeros
            products = zeros
            for group in range(K_GROUPS):
                slot = count % STAGES
                a_scale = gl.load(a_scales + group * a_scale_stride)
                b_scale = gl.load(b_scales + group)
                o_scale = gl.load(o_scales + group)
                mbarrier.wait(full.index(slot), count // STAGES & 1)
                a = a_bufs.index(2 * slot + WHICH)
                products = warpgroup_mma(
                    a, b_bufs.index(2 * slot).permute((1, 0)), products, use_acc=False, is_async=True
                )
                products = warpgroup_mma_wait(0, deps=(products,))
                first += products * (a_scale * b_scale)[:, None]
                products = warpgroup_mma(
                    a, b_bufs.index(2 * slot + 1).permute((1, 0)), products, use_acc=False, is_async=True
                )
                products = warpgroup_mma_wait(0, deps=(products,))
                mbarrier.arrive(empty.index(slot))
                second += products * (a_scale * o_scale)[:, None]
                count += 1
            _store(out_ptr, first, row, column_group, N_GROUPS, pairs_ptr, gates_ptr, num_pairs, TO_PAIRS, GATED)
            if column_group + 1 < N_GROUPS:
                _store(out_ptr, second, row, other, N_GROUPS, pairs_ptr, gates_ptr, num_pairs, TO_PAIRS, GATED)


@gluon.jit
def _store(
    out_ptr, values, row, column_group, N_GROUPS, pairs_ptr, gates_ptr, num_pairs,
    TO_PAIRS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    if TO_PAIRS and GATED:
        pairs = gl.load(pairs_ptr + row + gl.arange(0, HALF, gl.SliceLayout(1, MMA)))
        values *= gl.load(gates_ptr + pairs, mask=pairs < num_pairs, other=0.0)[:, None]
    out = gl.convert_layout(values.to(out_ptr.dtype.element_ty), STORE)
    rows = row + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    columns = column_group * B + gl.arange(0, B, gl.SliceLayout(0, STORE))
    if TO_PAIRS:
        pairs = gl.load(pairs_ptr + rows)
        places = pairs.to(gl.int64)[:, None] * (N_GROUPS * B) + columns[None, :]
        gl.store(out_ptr + places, out, mask=(pairs < num_pairs)[:, None])
    else:
        gl.store(out_ptr + rows.to(gl.int64)[:, None] * (N_GROUPS * B) + columns[None, :], out)


@gluon.jit(do_not_specialize=["num_tiles", "N_GROUPS", "K_GROUPS"])
def m_grouped_fp8(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, experts_ptr, pairs_ptr, gates_ptr, out_ptr,
    num_tiles, num_pairs, a_scale_stride, N_GROUPS, K_GROUPS,
    STAGES: gl.constexpr, TO_PAIRS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """a[R, K] @ b[expert of the rows, N, K]^T, to the rows or, times their gates, to their pairs."""
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, HALF, B], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [2 * STAGES, B, B], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (_multiply_m_grouped, (
                a_scale_ptr, b_scale_ptr, experts_ptr, pairs_ptr, gates_ptr, out_ptr, a_bufs, b_bufs, full, empty,
                num_tiles, num_pairs, a_scale_stride, N_GROUPS, K_GROUPS, FIRST, STAGES, TO_PAIRS, GATED,
            )),
            (_multiply_m_grouped, (
                a_scale_ptr, b_scale_ptr, experts_ptr, pairs_ptr, gates_ptr, out_ptr, a_bufs, b_bufs, full, empty,
                num_tiles, num_pairs, a_scale_stride, N_GROUPS, K_GROUPS, SECOND, STAGES, TO_PAIRS, GATED,
            )),
            (_load_m_grouped, (
                a_desc, b_desc, experts_ptr, a_bufs, b_bufs, full, empty, num_tiles, N_GROUPS, K_GROUPS, STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
