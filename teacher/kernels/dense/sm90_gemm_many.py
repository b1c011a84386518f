"""The Hopper side of the block-scaled products of many rows, dense and grouped by expert: one warp loads through TMA,
two groups of four warps multiply.

A consumer owns 64 rows of a 128x256 tile, as two accumulators of 64x128. While one scales and adds its 128 of K in
FP32, the other keeps the tensor cores busy. Programs are persistent. Dense ones walk the tiles in bands of rows that
share columns in the L2; grouped ones count the columns first, so that those which run together read one expert's
weights. `teacher.kernels.dense.gemm_triton` and `teacher.kernels.moe.grouped_gemm_triton` are the same in plain Triton.

A ring of STAGES slots, each 128 rows and two blocks of weights for one 128 of K, goes on through a program's tiles:

    loader      waits until a slot is empty (both consumers arrived), announces its bytes, asks the TMA for them
    consumers   wait until it is full (the bytes are there): left product, scale and add; right product,
                give the slot back, scale and add

Loader and consumers walk the same tiles and count the same steps, from which slot and phase follow.

Shape legend: M rows (tokens, or pairs by expert with padding), T tiles of 128 rows, E experts, N columns (of one
expert), K inner, B = 128.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from teacher.kernels.device import num_multiprocessors
from teacher.model.fp8 import BLOCK

B = gl.constexpr(BLOCK)
HALF = gl.constexpr(BLOCK // 2)  # rows of a consumer
MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]))
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
STORE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
SHARED = gl.NVMMASharedLayout.get_default_for
STAGES = 3  # a fourth costs 3% to 5% (H100)
BAND = 8  # tiles of rows of a dense product that take turns on one tile of columns
# A thread: two accumulators and the products that wait for their scales fill a consumer. The loader has four warps
# although one thread issues all copies, since registers change hands by whole warpgroups.
CONSUMER_REGISTERS, LOADER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def _where(tile, tiles_m, N_GROUPS, TILES: gl.constexpr):
    """(first row, first column group, second column group) of a tile; TILES is a band's height."""
    # Down the band's rows first, then on to its next columns: programs that run at one time share both in the L2.
    tiles_n = (N_GROUPS + 1) // 2
    first = tile // (TILES * tiles_n) * TILES
    height = gl.minimum(tiles_m - first, TILES)
    rest = tile % (TILES * tiles_n)
    column_group = rest // height * 2
    # The last of an odd number of groups comes twice; its second product is not stored.
    return (first + rest % height) * B, column_group, gl.minimum(column_group + 1, N_GROUPS - 1)


@gluon.jit
def _load(
    x_desc, weight_desc, experts_ptr, x_bufs, weight_bufs, full, empty, tiles_m, N_GROUPS, K_GROUPS,
    GROUPED: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    count = 0
    for tile in range(gl.program_id(0), tiles_m * ((N_GROUPS + 1) // 2), gl.num_programs(0)):
        row, column_group, other = _where(tile, tiles_m, N_GROUPS, TILES)
        expert = gl.to_tensor(0)
        if GROUPED:
            expert = gl.load(experts_ptr + row // B)
        # A tile of padding: the consumers skip it too.
        if expert >= 0:
            for group in range(K_GROUPS):
                slot = count % STAGES
                # Both consumers have given the slot back; in the ring's first round this returns at once.
                mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
                ready = full.index(slot)
                # The consumers go on when two halves of rows and two blocks of weights are there.
                mbarrier.expect(ready, 3 * B * B)
                k = group * B
                tma.async_copy_global_to_shared(x_desc, [row, k], ready, x_bufs.index(2 * slot))
                tma.async_copy_global_to_shared(x_desc, [row + HALF, k], ready, x_bufs.index(2 * slot + 1))
                tma.async_copy_global_to_shared(
                    weight_desc, [(expert * N_GROUPS + column_group) * B, k], ready, weight_bufs.index(2 * slot)
                )
                tma.async_copy_global_to_shared(
                    weight_desc, [(expert * N_GROUPS + other) * B, k], ready, weight_bufs.index(2 * slot + 1)
                )
                count += 1


@gluon.jit
def _multiply(
    x_scale_ptr, weight_scale_ptr, experts_ptr, out_ptr, x_bufs, weight_bufs, full, empty,
    num_rows, num_columns, x_scale_stride, tiles_m, N_GROUPS, K_GROUPS,
    WHICH: gl.constexpr, GROUPED: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    count = 0
    zeros = gl.zeros((HALF, B), gl.float32, MMA)
    for tile in range(gl.program_id(0), tiles_m * ((N_GROUPS + 1) // 2), gl.num_programs(0)):
        row, column_group, other = _where(tile, tiles_m, N_GROUPS, TILES)
        expert = gl.to_tensor(0)
        if GROUPED:
            expert = gl.load(experts_ptr + row // B)
        row += WHICH * HALF
        if expert >= 0:
            if row < num_rows:
                rows = row + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
                x_scales = x_scale_ptr + rows
                inside = rows < num_rows
                weight_scales = weight_scale_ptr + (expert * N_GROUPS + column_group) * K_GROUPS
                other_scales = weight_scale_ptr + (expert * N_GROUPS + other) * K_GROUPS
                left = zeros
                right = zeros
                products = zeros
                for group in range(K_GROUPS):
                    slot = count % STAGES
                    # The scales are on their way while the slot fills.
                    x_scale = gl.load(x_scales + group * x_scale_stride, mask=inside, other=0.0)
                    left_scale = gl.load(weight_scales + group)
                    right_scale = gl.load(other_scales + group)
                    # The loader's copies are there.
                    mbarrier.wait(full.index(slot), count // STAGES & 1)
                    x = x_bufs.index(2 * slot + WHICH)
                    # Left product. While this group scales it, the other one's product has the tensor cores.
                    products = warpgroup_mma(
                        x, weight_bufs.index(2 * slot).permute((1, 0)), products, use_acc=False, is_async=True
                    )
                    products = warpgroup_mma_wait(0, deps=(products,))
                    left += products * (x_scale * left_scale)[:, None]
                    # Right product.
                    products = warpgroup_mma(
                        x, weight_bufs.index(2 * slot + 1).permute((1, 0)), products, use_acc=False, is_async=True
                    )
                    products = warpgroup_mma_wait(0, deps=(products,))
                    # Nothing more is read from the slot: one of the two arrivals that the loader waits for.
                    mbarrier.arrive(empty.index(slot))
                    right += products * (x_scale * right_scale)[:, None]
                    count += 1
                _store(out_ptr, left, row, column_group * B, num_rows, num_columns)
                if column_group + 1 < N_GROUPS:
                    _store(out_ptr, right, row, other * B, num_rows, num_columns)
            else:
                for _ in range(K_GROUPS):  # padding alone: the loader counts on both consumers
                    slot = count % STAGES
                    mbarrier.wait(full.index(slot), count // STAGES & 1)
                    mbarrier.arrive(empty.index(slot))
                    count += 1


@gluon.jit
def _store(out_ptr, values, row, column, num_rows, num_columns):
    out = gl.convert_layout(values.to(out_ptr.dtype.element_ty), STORE)
    rows = row + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, B, gl.SliceLayout(0, STORE))
    places = rows.to(gl.int64)[:, None] * num_columns + columns[None, :]
    gl.store(out_ptr + places, out, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@gluon.jit(do_not_specialize=["num_rows", "tiles_m", "N_GROUPS", "K_GROUPS"])
def _block_gemm(
    x_desc, weight_desc, x_scale_ptr, weight_scale_ptr, experts_ptr, out_ptr,
    num_rows, num_columns, x_scale_stride, tiles_m, N_GROUPS, K_GROUPS,
    GROUPED: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, B], x_desc.layout)
    weight_bufs = gl.allocate_shared_memory(weight_desc.dtype, [2 * STAGES, B, B], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        # One arrival, the loader's, and the bytes that it announces; one arrival of each consumer.
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    # The TMA must see the barriers as they are now.
    fence_async_shared()
    # The first consumer runs in the program's own four warps.
    gl.warp_specialize(
        [
            (_multiply, (
                x_scale_ptr, weight_scale_ptr, experts_ptr, out_ptr, x_bufs, weight_bufs, full, empty,
                num_rows, num_columns, x_scale_stride, tiles_m, N_GROUPS, K_GROUPS,
                FIRST, GROUPED, TILES, STAGES,
            )),
            (_multiply, (
                x_scale_ptr, weight_scale_ptr, experts_ptr, out_ptr, x_bufs, weight_bufs, full, empty,
                num_rows, num_columns, x_scale_stride, tiles_m, N_GROUPS, K_GROUPS,
                SECOND, GROUPED, TILES, STAGES,
            )),
            (_load, (
                x_desc, weight_desc, experts_ptr, x_bufs, weight_bufs, full, empty, tiles_m, N_GROUPS, K_GROUPS,
                GROUPED, TILES, STAGES,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def block_gemm_hopper(
    x_MK: Tensor, x_scale_inv_MG: Tensor, weight_NK: Tensor, scale_inv_PG: Tensor, out: Tensor
) -> None:
    """out[m] = x[m] @ weight^T; `teacher.kernels.dense.gemm.block_gemm` has checked the shapes."""
    _launch(x_MK, x_scale_inv_MG, weight_NK, scale_inv_PG, out, -(-weight_NK.shape[0] // BLOCK), BAND)


def grouped_gemm_hopper(
    x_MK: Tensor,
    x_scale_inv_MG: Tensor,
    weight_ENK: Tensor,
    scale_inv_EPG: Tensor,
    out: Tensor,
    *,
    experts_T: Tensor,
) -> None:
    """out[m] = x[m] @ weight[expert of m]^T; tiles of expert -1 stay unwritten."""
    groups = weight_ENK.shape[1] // BLOCK
    _launch(x_MK, x_scale_inv_MG, weight_ENK.flatten(0, 1), scale_inv_EPG, out, groups, 1, experts_T)


def _launch(
    x_MK: Tensor,
    x_scale_inv_MG: Tensor,
    weight_NK: Tensor,
    scale_inv: Tensor,
    out: Tensor,
    column_groups: int,
    band: int,
    experts_T: Tensor | None = None,
) -> None:
    (num_rows, num_inner), num_columns = x_MK.shape, out.shape[1]
    x_tile, weight_tile = [BLOCK // 2, BLOCK], [BLOCK, BLOCK]
    x_desc = TensorDescriptor.from_tensor(x_MK, x_tile, SHARED(x_tile, gl.float8e4nv))
    weight_desc = TensorDescriptor.from_tensor(weight_NK, weight_tile, SHARED(weight_tile, gl.float8e4nv))
    tiles_m = triton.cdiv(num_rows, BLOCK)
    programs = min(num_multiprocessors(x_MK.device), tiles_m * ((column_groups + 1) // 2))
    _block_gemm[(programs,)](
        x_desc, weight_desc, x_scale_inv_MG, scale_inv, experts_T, out,
        num_rows, num_columns, x_scale_inv_MG.stride(1), tiles_m, column_groups, num_inner // BLOCK,
        GROUPED=experts_T is not None, TILES=band, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
