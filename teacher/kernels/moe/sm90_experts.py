"""The two products of the routed experts on Hopper: an expert with up to 144 rows has each block of its weights brought
to a multiprocessor once.

A warp loads through TMA, two groups of four warps multiply. A consumer owns 64 rows of a unit of 128 rows and 2 x 128
columns, as two accumulators, as in `teacher.kernels.dense.sm90_gemm_many`. With a mean of 128 rows an expert, half of
all experts have a few more: a second tile of rows would be nearly empty, and would bring all of the expert's weights
again. Up to 16 such rows form a tail, which the same unit multiplies with weights and rows exchanged (the tensor cores
want 64 rows on one side, 8 on the other): each consumer takes the tail's products with 64 of each 128 columns.

The first product's two blocks of columns are gate and up of the same 128, so that SwiGLU and its quantisation (a scale
for each row's 128) end it in registers; for the tail, the consumers tell each other the largest magnitudes that they
have found.

Units come from a list, those with a tail first. Programs are persistent and take the next piece of work when they are
through with one, since pieces differ: a counter in memory says which is next, the loader asks it and tells the
consumers.

Barriers, and who waits:

    full        the loader's announced bytes have come; both consumers
    empty       both consumers have read a slot; the loader
    told        the next piece of work's number lies in its box; both consumers
    heard       both consumers have read a box; the loader
    measured    both consumers' largest magnitudes of a tail are there; both consumers

Shape legend: M rows by expert with padding, T tiles of 128 rows, U units, E experts, N columns (of one expert),
K inner, B = 128, D hidden, I expert intermediate, P and G blocks of the weights' rows and columns.
"""

from __future__ import annotations

import torch
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
from teacher.kernels.moe.units import HALF_UNIT, TAILED_UNIT, UNIT_KINDS
from teacher.kernels.quantise import reference as quantise_twin
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.model.fp8 import BLOCK, E4M3_MAX

B = gl.constexpr(BLOCK)
HALF = gl.constexpr(BLOCK // 2)  # rows of a consumer, and its columns of a tail
TAIL_ROWS = 16
TAIL = gl.constexpr(TAIL_ROWS)
TAILED, HALVED, NUM_KINDS = gl.constexpr(TAILED_UNIT), gl.constexpr(HALF_UNIT), gl.constexpr(UNIT_KINDS)
MAX = gl.constexpr(E4M3_MAX)
LEAST = gl.constexpr(quantise_twin.LEAST_MAGNITUDE)

MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32]))
TAIL_MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TAIL_ROWS, 32])
)
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
STORE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
STORE_E4M3 = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
TAIL_STORE = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
MAXIMA = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
SHARED = gl.NVMMASharedLayout.get_default_for
STAGES = 3
# As in `teacher.kernels.dense.sm90_gemm_many`: the loader has a warpgroup although one thread issues all copies.
CONSUMER_REGISTERS, LOADER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def _place(units_ptr, work, N_GROUPS, FUSED: gl.constexpr):
    """(first row, kind, first and second group of columns) of a piece of work: a unit and two groups of columns."""
    tiles_n = (N_GROUPS + 1) // 2
    unit = gl.load(units_ptr + 1 + work // tiles_n)
    column = work % tiles_n
    # Gate and up of the same columns, or neighbours; the last of an odd number of groups comes twice.
    if FUSED:
        left = column
        right = column + tiles_n
    else:
        left = column * 2
        right = gl.minimum(left + 1, N_GROUPS - 1)
    return unit // NUM_KINDS * B, unit % NUM_KINDS, left, right


@gluon.jit
def _load(sources, lists, buffers, bars, news, N_GROUPS, K_GROUPS, FUSED: gl.constexpr, STAGES: gl.constexpr):
    """Takes the next piece of work when it is through with one, and tells the consumers."""
    x_desc, tail_desc, weight_desc = sources
    units_ptr, experts_ptr, taken_ptr = lists
    x_bufs, tail_bufs, weight_bufs = buffers
    full, empty = bars
    box, told, heard = news
    count = 0
    turn = 0
    work = gl.program_id(0)
    total = gl.load(units_ptr) * ((N_GROUPS + 1) // 2)
    while work < total:
        row, kind, left, right = _place(units_ptr, work, N_GROUPS, FUSED)
        first_group = gl.load(experts_ptr + row // B) * N_GROUPS
        left_row = (first_group + left) * B
        right_row = (first_group + right) * B
        for group in range(K_GROUPS):
            slot = count % STAGES
            # Both consumers have given the slot back; in the ring's first round this returns at once.
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
            ready = full.index(slot)
            # The barrier counts the bytes that this kind of unit brings.
            if kind == TAILED:
                mbarrier.expect(ready, (3 * B + TAIL) * B)
            elif kind == HALVED:
                mbarrier.expect(ready, (3 * B - HALF) * B)
            else:
                mbarrier.expect(ready, 3 * B * B)
            k = group * B
            second, tail = x_bufs.index(2 * slot + 1), tail_bufs.index(slot)
            tma.async_copy_global_to_shared(x_desc, [row, k], ready, x_bufs.index(2 * slot))
            tma.async_copy_global_to_shared(x_desc, [row + HALF, k], ready, second, pred=kind != HALVED)
            tma.async_copy_global_to_shared(weight_desc, [left_row, k], ready, weight_bufs.index(2 * slot))
            tma.async_copy_global_to_shared(weight_desc, [right_row, k], ready, weight_bufs.index(2 * slot + 1))
            tma.async_copy_global_to_shared(tail_desc, [row + B, k], ready, tail, pred=kind == TAILED)
            count += 1
        # Asked for while the consumers still multiply what was loaded last.
        work = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1, sem="relaxed")
        # Two boxes: both consumers have read what lay in this one two pieces ago.
        mbarrier.wait(heard.index(turn & 1), (turn >> 1 & 1) ^ 1)
        box.index(turn & 1).store(gl.full([1], work, gl.int32, ONE))
        # Releases both consumers.
        mbarrier.arrive(told.index(turn & 1))
        turn += 1


@gluon.jit
def _next_work(news, turn):
    box, told, heard = news
    # The loader has put the number into the box.
    mbarrier.wait(told.index(turn & 1), turn >> 1 & 1)
    work = gl.max(box.index(turn & 1).load(ONE), axis=0)
    # One of two arrivals after which the loader may use the box again.
    mbarrier.arrive(heard.index(turn & 1))
    return work


@gluon.jit
def _sums(
    x_scales, left_scales, right_scales, buffers, bars, row, K_GROUPS, count,
    WHICH: gl.constexpr, HAS_TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """FP32: this consumer's 64 rows by both groups of columns; its 64 columns of each group by the tail's rows."""
    x_scale_ptr, x_scale_stride = x_scales
    x_bufs, tail_bufs, weight_bufs = buffers
    full, empty = bars
    rows = row + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
    tail_rows = row + B + gl.arange(0, TAIL, gl.SliceLayout(0, TAIL_MMA))
    left = gl.zeros((HALF, B), gl.float32, MMA)
    right = gl.zeros((HALF, B), gl.float32, MMA)
    products = gl.zeros((HALF, B), gl.float32, MMA)
    tail_left = gl.zeros((HALF, TAIL), gl.float32, TAIL_MMA)
    tail_right = gl.zeros((HALF, TAIL), gl.float32, TAIL_MMA)
    for group in range(K_GROUPS):
        slot = count % STAGES
        # The scales are on their way while the slot fills.
        x_scale = gl.load(x_scale_ptr + group * x_scale_stride + rows)
        left_scale = gl.load(left_scales + group)
        right_scale = gl.load(right_scales + group)
        if HAS_TAIL:
            tail_scale = gl.load(x_scale_ptr + group * x_scale_stride + tail_rows)
        # The loader's copies are there.
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        x = x_bufs.index(2 * slot + WHICH)
        left_weight, right_weight = weight_bufs.index(2 * slot), weight_bufs.index(2 * slot + 1)
        # 1. Left columns. While this group scales the product, the other one's has the tensor cores.
        products = warpgroup_mma(x, left_weight.permute((1, 0)), products, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=(products,))
        left += products * (x_scale * left_scale)[:, None]
        if HAS_TAIL:
            # 2. The tail by this consumer's 64 of either 128 columns, the weights on the tensor cores' long side.
            tail = tail_bufs.index(slot).permute((1, 0))
            nothing = gl.zeros((HALF, TAIL), gl.float32, TAIL_MMA)
            part = left_weight.slice(WHICH * HALF, HALF)
            left_products = warpgroup_mma(part, tail, nothing, use_acc=False, is_async=True)
            part = right_weight.slice(WHICH * HALF, HALF)
            right_products = warpgroup_mma(part, tail, nothing, use_acc=False, is_async=True)
            left_products, right_products = warpgroup_mma_wait(0, deps=(left_products, right_products))
            tail_left += left_products * (tail_scale * left_scale)[None, :]
            tail_right += right_products * (tail_scale * right_scale)[None, :]
        # 3. Right columns.
        products = warpgroup_mma(x, right_weight.permute((1, 0)), products, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=(products,))
        # Nothing more is read from the slot: one of the two arrivals that the loader waits for.
        mbarrier.arrive(empty.index(slot))
        right += products * (x_scale * right_scale)[:, None]
        count += 1
    return left, right, tail_left, tail_right, count


@gluon.jit
def _store_rows(out_ptr, values, row, column, num_columns):
    out = gl.convert_layout(values.to(out_ptr.dtype.element_ty), STORE)
    rows = row + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    columns = column + gl.arange(0, B, gl.SliceLayout(0, STORE))
    gl.store(out_ptr + rows.to(gl.int64)[:, None] * num_columns + columns[None, :], out)


@gluon.jit
def _store_tail(out_ptr, values, row, column, num_columns):
    """values [columns, rows of the tail]."""
    out = gl.convert_layout(values, TAIL_STORE).to(out_ptr.dtype.element_ty)
    rows = row + gl.arange(0, TAIL, gl.SliceLayout(0, TAIL_STORE))
    columns = column + gl.arange(0, HALF, gl.SliceLayout(1, TAIL_STORE))
    gl.store(out_ptr + rows.to(gl.int64)[None, :] * num_columns + columns[:, None], out)


@gluon.jit
def _swiglu(gate, up):
    """gate / (1 + exp(-gate)) * up, one number after the other: 64 of each in registers leave none for 64 of every
    number between. The hardware's approximations are good to 22 bits, of which E4M3 keeps four."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 t, t;
        mul.f32 t, t, $1;
        mul.f32 $0, t, $2;
        }""",
        "=f,f,f", [gate, up], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _quantise_rows(results, gate, up, row, column):
    out_ptr, num_columns, out_scale_ptr, out_scale_stride = results
    activated = _swiglu(gate, up)
    largest = gl.maximum(gl.max(gl.abs(activated), axis=1), LEAST)
    values = (activated * gl.div_rn(gl.full_like(largest, MAX), largest)[:, None]).to(gl.float8e4nv)
    values = gl.convert_layout(values, STORE_E4M3)
    rows = row + gl.arange(0, HALF, gl.SliceLayout(1, STORE_E4M3))
    columns = column * B + gl.arange(0, B, gl.SliceLayout(0, STORE_E4M3))
    gl.store(out_ptr + rows.to(gl.int64)[:, None] * num_columns + columns[None, :], values)
    rows = row + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
    gl.store(out_scale_ptr + column * out_scale_stride + rows, gl.div_rn(largest, gl.full_like(largest, MAX)))


@gluon.jit
def _quantise_tail(results, exchange, gate, up, row, column, tails, WHICH: gl.constexpr):
    out_ptr, num_columns, out_scale_ptr, out_scale_stride = results
    maxima, measured = exchange
    layout: gl.constexpr = gl.SliceLayout(0, TAIL_MMA)
    activated = _swiglu(gate, up)
    mine = gl.max(gl.abs(activated), axis=0)
    place = 2 * (tails & 1)  # the other consumer may still be reading what it was told of the last tail
    # A scale is over 128 columns, of which the other consumer has 64: each tells the other its maximum.
    maxima.index(place + WHICH).store(mine)
    # Goes on when both have arrived.
    mbarrier.arrive(measured)
    mbarrier.wait(measured, tails & 1)
    largest = gl.maximum(gl.maximum(mine, maxima.index(place + 1 - WHICH).load(layout)), LEAST)
    scaled = activated * gl.div_rn(gl.full_like(largest, MAX), largest)[None, :]
    _store_tail(out_ptr, scaled, row, column * B + WHICH * HALF, num_columns)
    if WHICH == FIRST:
        rows = row + gl.arange(0, TAIL, layout)
        gl.store(out_scale_ptr + column * out_scale_stride + rows, gl.div_rn(largest, gl.full_like(largest, MAX)))


@gluon.jit
def _unit(
    x_scales, left_scales, right_scales, buffers, bars, exchange, results, row, left_group, right_group, N_GROUPS,
    K_GROUPS, count, tails,
    WHICH: gl.constexpr, HAS_TAIL: gl.constexpr, FUSED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    left, right, tail_left, tail_right, count = _sums(
        x_scales, left_scales, right_scales, buffers, bars, row, K_GROUPS, count, WHICH, HAS_TAIL, STAGES
    )
    mine = row + WHICH * HALF
    if FUSED:
        if HAS_TAIL:
            _quantise_tail(results, exchange, tail_left, tail_right, row + B, left_group, tails, WHICH)
        _quantise_rows(results, left, right, mine, left_group)
    else:
        out_ptr, num_columns, _, _ = results
        _store_rows(out_ptr, left, mine, left_group * B, num_columns)
        if HAS_TAIL:
            _store_tail(out_ptr, tail_left, row + B, left_group * B + WHICH * HALF, num_columns)
        if left_group + 1 < N_GROUPS:
            _store_rows(out_ptr, right, mine, right_group * B, num_columns)
            if HAS_TAIL:
                _store_tail(out_ptr, tail_right, row + B, right_group * B + WHICH * HALF, num_columns)
    return count


@gluon.jit
def _multiply(
    x_scales, weight_scale_ptr, lists, buffers, bars, news, exchange, results, N_GROUPS, K_GROUPS,
    WHICH: gl.constexpr, FUSED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    units_ptr, experts_ptr = lists[0], lists[1]
    full, empty = bars
    count = 0
    tails = 0
    turn = 0
    work = gl.program_id(0)
    total = gl.load(units_ptr) * ((N_GROUPS + 1) // 2)
    while work < total:
        row, kind, left_group, right_group = _place(units_ptr, work, N_GROUPS, FUSED)
        first_group = gl.load(experts_ptr + row // B) * N_GROUPS
        left_scales = weight_scale_ptr + (first_group + left_group) * K_GROUPS
        right_scales = weight_scale_ptr + (first_group + right_group) * K_GROUPS
        if kind == TAILED:
            count = _unit(
                x_scales, left_scales, right_scales, buffers, bars, exchange, results, row, left_group, right_group,
                N_GROUPS, K_GROUPS, count, tails, WHICH, True, FUSED, STAGES,
            )  # fmt: skip
            tails += 1
        elif kind * WHICH != HALVED:
            count = _unit(
                x_scales, left_scales, right_scales, buffers, bars, exchange, results, row, left_group, right_group,
                N_GROUPS, K_GROUPS, count, tails, WHICH, False, FUSED, STAGES,
            )  # fmt: skip
        else:
            for _ in range(K_GROUPS):  # the second half of a half unit: the loader counts on both consumers
                slot = count % STAGES
                mbarrier.wait(full.index(slot), count // STAGES & 1)
                mbarrier.arrive(empty.index(slot))
                count += 1
        work = _next_work(news, turn)
        turn += 1


@gluon.jit(do_not_specialize=["N_GROUPS", "K_GROUPS"])
def _unit_gemm(
    x_desc, tail_desc, weight_desc, x_scale_ptr, weight_scale_ptr, experts_ptr, units_ptr, taken_ptr, out_ptr,
    out_scale_ptr, num_columns, x_scale_stride, out_scale_stride, N_GROUPS, K_GROUPS,
    FUSED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, HALF, B], x_desc.layout)
    weight_bufs = gl.allocate_shared_memory(weight_desc.dtype, [2 * STAGES, B, B], weight_desc.layout)
    tail_bufs = gl.allocate_shared_memory(tail_desc.dtype, [STAGES, TAIL, B], tail_desc.layout)
    maxima = gl.allocate_shared_memory(gl.float32, [4, TAIL], MAXIMA)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    measured = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    box = gl.allocate_shared_memory(gl.int32, [2, 1], MAXIMA)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        # One arrival, the loader's, and the bytes that it announces; one arrival of each consumer.
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    mbarrier.init(measured.index(0), count=2)
    for slot in gl.static_range(2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=2)
    # The TMA must see the barriers as they are now.
    fence_async_shared()
    sources, lists = (x_desc, tail_desc, weight_desc), (units_ptr, experts_ptr, taken_ptr)
    x_scales, results = (x_scale_ptr, x_scale_stride), (out_ptr, num_columns, out_scale_ptr, out_scale_stride)
    buffers, bars, exchange = (x_bufs, tail_bufs, weight_bufs), (full, empty), (maxima, measured.index(0))
    news = (box, told, heard)
    gl.warp_specialize(
        [
            (_multiply, (
                x_scales, weight_scale_ptr, lists, buffers, bars, news, exchange, results, N_GROUPS, K_GROUPS,
                FIRST, FUSED, STAGES,
            )),
            (_multiply, (
                x_scales, weight_scale_ptr, lists, buffers, bars, news, exchange, results, N_GROUPS, K_GROUPS,
                SECOND, FUSED, STAGES,
            )),
            (_load, (sources, lists, buffers, bars, news, N_GROUPS, K_GROUPS, FUSED, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def gate_up_hopper(
    rows: Quantised, gate_up_E2ID: Tensor, scale_inv_EPG: Tensor, *, experts_T: Tensor, units_U: Tensor
) -> Quantised:
    """SwiGLU of the first product, quantised: E4M3 [M, I]."""
    num_rows, inner = rows.values_MK.shape[0], gate_up_E2ID.shape[1] // 2
    values = rows.values_MK.new_empty(num_rows, inner)
    scales = empty_scales(num_rows, inner // BLOCK, values.device)
    _launch(rows, gate_up_E2ID, scale_inv_EPG, values, scales, experts_T, units_U)
    return Quantised(values, scales)


def down_hopper(
    rows: Quantised, down_EDI: Tensor, scale_inv_EPG: Tensor, out: Tensor, *, experts_T: Tensor, units_U: Tensor
) -> None:
    """out[m] = rows[m] @ down^T of m's expert, BF16 [M, D]."""
    _launch(rows, down_EDI, scale_inv_EPG, out, None, experts_T, units_U)


def _launch(
    rows: Quantised,
    weight_ENK: Tensor,
    scale_inv_EPG: Tensor,
    out: Tensor,
    out_scales: Tensor | None,
    experts_T: Tensor,
    units_U: Tensor,
) -> None:
    _, num_columns, num_inner = weight_ENK.shape
    groups = num_columns // BLOCK
    taken = torch.zeros(1, dtype=torch.int32, device=out.device)
    programs = min(num_multiprocessors(out.device), experts_T.numel() * ((groups + 1) // 2))
    _unit_gemm[(programs,)](
        _boxes(rows.values_MK, BLOCK // 2), _boxes(rows.values_MK, TAIL_ROWS),
        _boxes(weight_ENK.flatten(0, 1), BLOCK), rows.scale_inv_MG, scale_inv_EPG, experts_T, units_U, taken,
        out, out_scales, out.shape[1], rows.scale_inv_MG.stride(1),
        0 if out_scales is None else out_scales.stride(1), groups, num_inner // BLOCK,
        FUSED=out_scales is not None, STAGES=STAGES, num_warps=4,
    )  # fmt: skip


def _boxes(matrix: Tensor, rows: int) -> TensorDescriptor:
    box = [rows, BLOCK]
    return TensorDescriptor.from_tensor(matrix, box, SHARED(box, gl.float8e4nv))
