"""The Hopper side of the block-scaled product of few rows: one warp loads through TMA, four multiply.

Here the weights' bytes are the bound, so the loader must never wait for arithmetic: it runs as many groups of K ahead
as there are stages, and two programs share a multiprocessor. Programs walk K in step with each other, so that all of
them read the same tile of activations at about the same time. Split K is that of `teacher.kernels.dense.gemm_triton`,
which is the same in plain Triton.

A ring of slots, each a tile of weights, one of activations and the activations' scales for one 128 of K:

    loader      waits until a slot is empty, announces its bytes, asks the TMA for them
    consumer    waits until it is full, multiplies, gives it back, scales and adds

With several parts of K, the last program that arrives at a tile adds up all of them and stores.

Shape legend: M rows (tokens), N columns (outputs), K inner, G = K / 128, P = ceil(N / 128), B = 128.
"""

from __future__ import annotations

import torch
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

from teacher.kernels.dense.gemm_arrivals import arrival_counters
from teacher.kernels.dense.reference import GemmTiling
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK

B = gl.constexpr(BLOCK)
SHARED = gl.NVMMASharedLayout.get_default_for
LINE = 32  # FP32 numbers: TMA wants its targets on multiples of 128 bytes
MOST_REGISTERS = 128  # a thread, of 256: two programs a multiprocessor
LOADER_REGISTERS = 40  # the multiplying warps get what is left


@gluon.jit
def _load(
    x_desc, weight_desc, x_scale_desc, x_bufs, weight_bufs, scale_bufs, full, empty,
    row, column, first, last, x_scale_stride, SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for group in range(first, last):
        step = group - first
        slot = step % STAGES
        # The consumer has given the slot back; in the ring's first round this returns at once.
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        ready = full.index(slot)
        # The consumer goes on when all three have come.
        mbarrier.expect(ready, SIZE)
        tma.async_copy_global_to_shared(weight_desc, [column, group * B], ready, weight_bufs.index(slot))
        tma.async_copy_global_to_shared(x_desc, [row, group * B], ready, x_bufs.index(slot))
        tma.async_copy_global_to_shared(x_scale_desc, [group * x_scale_stride + row], ready, scale_bufs.index(slot))


@gluon.jit
def _multiply(
    weight_scale_ptr, out_ptr, parts_ptr, arrivals_ptr, x_bufs, weight_bufs, scale_bufs, full, empty,
    row, column, first, last, num_rows, num_columns, G,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    weight_scales = weight_scale_ptr + column // B * G
    # The weights' factors are loaded a step ahead: nothing else hides their way from memory.
    next_scale = gl.load(weight_scales + first)
    zeros = gl.zeros((COLUMNS, ROWS), gl.float32, MMA)
    sums = zeros
    for group in range(first, last):
        step = group - first
        slot = step % STAGES
        weight_scale = next_scale
        next_scale = gl.load(weight_scales + gl.minimum(group + 1, last - 1))
        # The loader's copies are there.
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        products = warpgroup_mma(
            weight_bufs.index(slot), x_bufs.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        # Read while the product runs.
        x_scale = scale_bufs.index(slot).slice(0, ROWS).load(gl.SliceLayout(0, MMA))
        products = warpgroup_mma_wait(0, deps=(products,))
        # Product and scales are read: the loader may fill the slot again.
        mbarrier.arrive(empty.index(slot))
        sums += products * (x_scale * weight_scale)[None, :]
    complete = True
    if SPLITS > 1:
        tile = gl.program_id(0)
        parts_ptr += tile.to(gl.int64) * SPLITS * ROWS * COLUMNS
        sums, complete = _add_parts(sums, zeros, parts_ptr, arrivals_ptr + tile, ROWS, COLUMNS, SPLITS)
    if complete:
        _store(out_ptr, sums, row, column, num_rows, num_columns, ROWS, COLUMNS)


@gluon.jit
def _add_parts(
    sums, zeros, parts_ptr, arrivals_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, SPLITS: gl.constexpr
):  # fmt: skip
    """Store this part; the last program at the tile adds all of them, as `_add_parts` of `gemm_triton`.

    Eight rows of a column lie side by side: a warp stores 256 bytes on end.
    """
    SIZE: gl.constexpr = ROWS * COLUMNS
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(1, sums.type.layout))[:, None]
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, sums.type.layout))[None, :]
    places = rows // 8 * (8 * COLUMNS) + columns * 8 + rows % 8
    # 1. Past the L1, to where the other programs see it.
    gl.store(parts_ptr + gl.program_id(1) * SIZE + places, sums, cache_modifier=".cg")
    # 2. Every warp has stored before one thread counts: its atomic releases the part, and acquires the others'.
    gl.thread_barrier()
    complete = gl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1
    if complete:
        # 3. All parts are there. In their order, whichever came last, so that results repeat.
        sums = zeros
        for part in gl.static_range(SPLITS):
            sums += gl.load(parts_ptr + part * SIZE + places, cache_modifier=".cg")
        # As the next launch expects it.
        gl.store(arrivals_ptr, 0)
    return sums, complete


@gluon.jit
def _store(out_ptr, sums, row, column, num_rows, num_columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    out = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), STORE)
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(1, STORE))
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, STORE))
    places = rows.to(gl.int64)[None, :] * num_columns + columns[:, None]
    gl.store(out_ptr + places, out, mask=(rows < num_rows)[None, :] & (columns < num_columns)[:, None])


@gluon.jit(do_not_specialize=["num_rows", "G", "groups_a_part", "x_scale_stride", "tiles_m"])
def _few_rows_gemm(
    x_desc, weight_desc, x_scale_desc, weight_scale_ptr, out_ptr, parts_ptr, arrivals_ptr,
    num_rows, num_columns, G, groups_a_part, x_scale_stride, tiles_m,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, B], x_desc.layout)
    weight_bufs = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, COLUMNS, B], weight_desc.layout)
    SCALES: gl.constexpr = x_scale_desc.block_shape[0]
    scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, SCALES], x_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        # One arrival, the loader's, and the bytes that it announces; one arrival of the consumer's.
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    # The TMA must see the barriers as they are now.
    fence_async_shared()
    tile = gl.program_id(0)
    row = tile % tiles_m * ROWS
    column = tile // tiles_m * COLUMNS
    first = gl.program_id(1) * groups_a_part
    last = gl.minimum(first + groups_a_part, G)
    SIZE: gl.constexpr = (COLUMNS + ROWS) * B + SCALES * 4
    # The consumer runs in the program's own four warps, the loader in one more.
    gl.warp_specialize(
        [
            (_multiply, (
                weight_scale_ptr, out_ptr, parts_ptr, arrivals_ptr, x_bufs, weight_bufs, scale_bufs, full, empty,
                row, column, first, last, num_rows, num_columns, G, ROWS, COLUMNS, SPLITS, STAGES,
            )),
            (_load, (
                x_desc, weight_desc, x_scale_desc, x_bufs, weight_bufs, scale_bufs, full, empty,
                row, column, first, last, x_scale_stride, SIZE, STAGES,
            )),
        ],
        [1],
        [LOADERS],
    )  # fmt: skip


def few_rows_gemm_hopper(
    x: Quantised, weight_NK: Tensor, scale_inv_PG: Tensor, out: Tensor, tiling: GemmTiling
) -> None:
    """out[m] = x[m] @ weight^T; `teacher.kernels.dense.gemm.block_gemm` has checked the shapes."""
    (num_rows, num_columns), groups = out.shape, scale_inv_PG.shape[1]
    groups_a_part = -(-groups // tiling.splits)
    splits = -(-groups // groups_a_part)
    tiles_m, tiles = triton.cdiv(num_rows, tiling.rows), triton.cdiv(num_columns, tiling.columns)
    tiles *= tiles_m
    parts = arrivals = None
    if splits > 1:
        parts = torch.empty(tiles * splits, tiling.rows * tiling.columns, device=out.device)
        arrivals = arrival_counters(out.device, tiles)
    x_tile, weight_tile = [tiling.rows, BLOCK], [tiling.columns, BLOCK]
    scales, stride = _in_line(x.scale_inv_MG)
    _few_rows_gemm[(tiles, splits)](
        TensorDescriptor.from_tensor(x.values_MK, x_tile, SHARED(x_tile, gl.float8e4nv)),
        TensorDescriptor.from_tensor(weight_NK, weight_tile, SHARED(weight_tile, gl.float8e4nv)),
        TensorDescriptor.from_tensor(scales, [max(LINE, tiling.rows)], gl.NVMMASharedLayout(0, 32, 1)),
        scale_inv_PG, out, parts, arrivals, num_rows, num_columns, groups, groups_a_part, stride, tiles_m,
        ROWS=tiling.rows, COLUMNS=tiling.columns, SPLITS=splits, STAGES=tiling.num_stages, LOADERS=LOADER_REGISTERS,
        num_warps=4, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def _in_line(scale_inv_MG: Tensor) -> tuple[Tensor, int]:
    """The factors as they lie in memory, group after group, and the distance between groups."""
    if scale_inv_MG.data_ptr() % 16:  # a slice of rows, where TMA cannot begin
        scale_inv_MG = scale_inv_MG.t().contiguous().t()
    (num_rows, groups), stride = scale_inv_MG.shape, scale_inv_MG.stride(1)
    return scale_inv_MG.as_strided(((groups - 1) * stride + num_rows,), (1,)), stride
