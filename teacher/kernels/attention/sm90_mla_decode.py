"""The Hopper side of `mla_decode`: two warpgroups that take turns on the tensor cores, and a loader.

All heads share one latent, so the output of a program's 64 rows is 64 x 512 in FP32: half of it fills the registers of
a warpgroup. So `_even` owns the left 256 columns and `_odd` the right ones, and each computes the logits of every other
page; the weights go through shared memory to the other group, which needs them for its own columns. Of a pair of pages:

    _even                                           _odd
    1 logits of the even page                       1 logits of the odd page
    2 maximum over it, told (M_EVEN)                2 waits for it, joint maximum over both pages
    3 weights, left += weights x even page          3 weights, told with the joint maximum (P_ODD)
    4 waits for them (P_ODD)
    5 own weights at the joint maximum (P_EVEN)     4 right += weights x odd page
    6 left += odd weights x odd page                5 waits for them (P_EVEN), right += even weights x even page

While one group is at its exponentials the other keeps the tensor cores busy, as in FlashMLA's "seesaw" schedule. What a
page's rope keys lay in takes its weights, once the logits are there: both are 64 x 64 numbers in BF16. The loader
(`teacher.kernels.attention.sm90_mla_load`) brings the next pair half by half, as the groups give the halves back
(K_EMPTY).
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from teacher.kernels.attention.mla_cache import PAGE, Entries
from teacher.kernels.attention.sm90_mla_load import (
    HALF,
    K_EMPTY,
    K_FULL,
    Q_EMPTY,
    Q_FULL,
    ROWS,
    SHARED,
    THREAD_ROWS,
    THREADS,
    TILE,
    C,
    P,
    R,
    load,
    share_of,
)

VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LOGITS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2))
LOGIT_ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS))
LOGIT_COLUMNS = gl.constexpr(gl.SliceLayout(0, LOGITS))
OUT_ROWS = gl.constexpr(gl.SliceLayout(1, OUT))
OUT_COLUMNS = gl.constexpr(gl.SliceLayout(0, OUT))
LOWEST = gl.constexpr(-1.0e30)  # a maximum over nothing: finite, since minus infinity from itself is NaN

# Barriers after the loader's: a warpgroup's maximum, weights, total are in shared memory for the other. Their buffers
# need none for the way back: a group writes one again only after a message that the other sent after reading it.
M_EVEN, P_EVEN, P_ODD, L_EVEN, L_ODD = (gl.constexpr(10 + place) for place in range(5))
BARRIERS = gl.constexpr(15)
# Of 504 registers for three threads, one of each warpgroup: those that compute; the loader has the rest.
REGISTERS, FP8_REGISTERS = 240, 200
V_M_EVEN, V_M_ODD, V_L_EVEN, V_L_ODD = (gl.constexpr(place) for place in range(4))


@gluon.jit
def _zero(number):
    """Zero, but the compiler must not know: it would compute the descriptors of all products before the loop, for which
    there are no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _logits(q_latent, q_rope, latent, rope, bars, slot: gl.constexpr, phase):
    """The queries' products with this warpgroup's page, half by half as they come."""
    first: gl.constexpr = slot  # page 0 comes left half first, page 1 right half first
    # A wait ends when the loader has filled that half; rope keys come with a page's second one.
    acc = gl.zeros([ROWS, P], gl.float32, LOGITS)
    mbarrier.wait(bars.index(K_FULL + slot * 2 + first), phase)
    acc = warpgroup_mma(
        q_latent.slice(first * HALF, HALF, dim=1), latent.slice(first * HALF, HALF, dim=1).permute((1, 0)), acc,
        use_acc=False, is_async=True,
    )  # fmt: skip
    second: gl.constexpr = 1 - slot
    mbarrier.wait(bars.index(K_FULL + slot * 2 + second), phase)
    acc = warpgroup_mma(
        q_latent.slice(second * HALF, HALF, dim=1), latent.slice(second * HALF, HALF, dim=1).permute((1, 0)), acc,
        is_async=True,
    )  # fmt: skip
    # The second wait covers the rope keys.
    acc = warpgroup_mma(q_rope, rope.permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _hide(logits, number, visible):
    tokens = number * P + gl.arange(0, P, LOGIT_COLUMNS)
    return gl.where(tokens[None, :] < visible[:, None], logits, float("-inf"))


@gluon.jit
def _scales(scales, number, length):
    """A page's scales, zero beyond the sequence's end."""
    tokens = number * P + gl.arange(0, P, LOGIT_COLUMNS)
    return gl.where(tokens < length, scales.load(LOGIT_COLUMNS), 0.0)[None, :]


@gluon.jit
def _blank(latent, number, length):
    """Zero the rows beyond the sequence's end: a weight of zero times a stale NaN would be NaN."""
    tokens = number * P + gl.arange(0, P, THREAD_ROWS)
    for tile in gl.static_range(C // TILE):
        view = latent.slice(tile * TILE, TILE, dim=1)
        values = view.load(THREADS)
        view.store(gl.where((tokens < length)[:, None], values, gl.zeros_like(values)))
    # The tensor cores read shared memory through another proxy than stores do: the fence puts these before them.
    fence_async_shared()


@gluon.jit
def _finish(acc, total, highest, begin, end, length, sequence, block, results, W, half: gl.constexpr):
    """Divide and store this warpgroup's half: the result itself if the share has all of the sequence, else a part."""
    parts_ptr, lse_ptr, out_ptr, part = results
    divisor = gl.where(total == 0, 1.0, total)
    acc = acc * gl.convert_layout(1.0 / divisor, OUT_ROWS)[:, None]
    rows = block * ROWS + gl.arange(0, ROWS, OUT_ROWS)
    columns = half * HALF + gl.arange(0, HALF, OUT_COLUMNS)
    inside = (rows < W)[:, None]
    if (begin == 0) & (end == (length + P - 1) // P):
        places = (sequence.to(gl.int64) * W + rows)[:, None] * C + columns[None, :]
        gl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = part * 2 + gl.where(begin == 0, 1, 0)
        places = (slot.to(gl.int64) * W + rows)[:, None] * C + columns[None, :]
        gl.store(parts_ptr + places, acc, mask=inside)
        if half == 0:
            lse_rows = block * ROWS + gl.arange(0, ROWS, LOGIT_ROWS)
            lse = gl.where(total == 0, float("-inf"), highest + gl.log2(divisor))
            gl.store(lse_ptr + slot * W + lse_rows, lse, mask=lse_rows < W)


@gluon.jit
def _even(buffers, bars, schedule, results, lengths_ptr, scale, block, W, H, S, FP8: gl.constexpr):
    """Even pages, left half of the columns."""
    q_latent, q_rope, latents, ropes, vectors, scales = buffers
    rows = block * ROWS + gl.arange(0, ROWS, LOGIT_ROWS)
    q_phase = 0
    phase = 0
    for sequence in range(schedule[0], schedule[2] + 1):
        begin, end = share_of(schedule, lengths_ptr, sequence)
        if begin < end:
            length = gl.load(lengths_ptr + sequence)
            visible = length - S + 1 + rows // H
            highest = gl.full([ROWS], LOWEST, gl.float32, LOGIT_ROWS)
            total = gl.zeros([ROWS], gl.float32, LOGIT_ROWS)
            acc = gl.zeros([ROWS, HALF], gl.float32, OUT)
            # The loader has brought this sequence's queries.
            mbarrier.wait(bars.index(Q_FULL), q_phase)
            for number in range(begin, end, 2):
                zero = _zero(number)
                latent, rope = latents.index(0 + zero), ropes.index(0 + zero)
                # 1: logits. They are done with the rope keys, whose place the weights take in 5.
                logits = _logits(q_latent.index(zero), q_rope.index(zero), latent, rope, bars, 0, phase)
                if FP8:
                    token_scale = _scales(scales.index(0), number, length)
                    logits = logits * token_scale
                logits = _hide(logits, number, visible)
                # 2: the maximum so far with this page; releases `_odd`, which goes on from it.
                higher = gl.maximum(highest, gl.max(logits, axis=1) * scale)
                vectors.index(V_M_EVEN).store(higher)
                mbarrier.arrive(bars.index(M_EVEN), count=1)
                # 3: weights, and the left columns of what the even page adds; the product runs on through 4 and 5.
                weights = gl.exp2(logits * scale - higher[:, None])
                shrink = gl.exp2(highest - higher)
                total = total * shrink + gl.sum(weights, axis=1)
                if FP8:
                    weights = weights * token_scale
                if number * P + P > length:
                    _blank(latent, number, length)
                # The sums so far were made at the last pair's maximum.
                acc = acc * gl.convert_layout(shrink, OUT_ROWS)[:, None]
                operand = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
                acc = warpgroup_mma(operand, latent.slice(0, HALF, dim=1), acc, is_async=True)
                # 4: `_odd` has stored its weights, and the maximum over both pages.
                mbarrier.wait(bars.index(P_ODD), phase)
                # 5: the even weights once more at that maximum, for `_odd`, which this releases.
                highest = vectors.index(V_M_ODD).load(LOGIT_ROWS)
                shrink = gl.exp2(higher - highest)
                total = total * shrink
                ropes.index(0).store((weights * shrink[:, None]).to(gl.bfloat16))
                # `_odd`'s product reads them as an operand, through the asynchronous proxy.
                fence_async_shared()
                mbarrier.arrive(bars.index(P_EVEN), count=1)
                # The product of 3 is done, and nobody else reads the even page's left half: back to the loader.
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(bars.index(K_EMPTY + 0), count=1)
                # 6: what 3 summed, at the joint maximum; to it the left columns of what the odd page adds.
                acc = acc * gl.convert_layout(shrink, OUT_ROWS)[:, None]
                acc = warpgroup_mma(
                    ropes.index(1 + zero), latents.index(1 + zero).slice(0, HALF, dim=1), acc, is_async=True
                )
                acc = warpgroup_mma_wait(0, deps=[acc])
                # `_odd` finished its logits before P_ODD: left half and rope keys' place go back to the loader.
                mbarrier.arrive(bars.index(K_EMPTY + 2), count=1)
                phase ^= 1
            # No more logits of this sequence here; with `_odd`'s arrival the loader may bring the next one's queries.
            mbarrier.arrive(bars.index(Q_EMPTY), count=1)
            # Each group has summed the weights of its own pages; the divisor is over both.
            vectors.index(V_L_EVEN).store(total)
            mbarrier.arrive(bars.index(L_EVEN), count=1)
            mbarrier.wait(bars.index(L_ODD), q_phase)
            total += vectors.index(V_L_ODD).load(LOGIT_ROWS)
            q_phase ^= 1
            _finish(acc, total, highest, begin, end, length, sequence, block, results, W, 0)


@gluon.jit
def _odd(buffers, bars, schedule, results, lengths_ptr, scale, block, W, H, S, FP8: gl.constexpr):
    """Odd pages, right half of the columns."""
    q_latent, q_rope, latents, ropes, vectors, scales = buffers
    rows = block * ROWS + gl.arange(0, ROWS, LOGIT_ROWS)
    q_phase = 0
    phase = 0
    for sequence in range(schedule[0], schedule[2] + 1):
        begin, end = share_of(schedule, lengths_ptr, sequence)
        if begin < end:
            length = gl.load(lengths_ptr + sequence)
            visible = length - S + 1 + rows // H
            highest = gl.full([ROWS], LOWEST, gl.float32, LOGIT_ROWS)
            total = gl.zeros([ROWS], gl.float32, LOGIT_ROWS)
            acc = gl.zeros([ROWS, HALF], gl.float32, OUT)
            # The loader has brought this sequence's queries.
            mbarrier.wait(bars.index(Q_FULL), q_phase)
            for number in range(begin + 1, end + 1, 2):
                zero = _zero(number)
                latent, rope = latents.index(1 + zero), ropes.index(1 + zero)
                # 1: logits.
                logits = _logits(q_latent.index(zero), q_rope.index(zero), latent, rope, bars, 1, phase)
                if FP8:
                    token_scale = _scales(scales.index(1), number, length)
                    logits = logits * token_scale
                # Beyond an odd number of pages the last one comes again: all of it is hidden.
                logits = _hide(logits, number, gl.where(number < end, visible, 0))
                top = gl.max(logits, axis=1) * scale
                # 2: `_even`'s maximum holds everything before this pair, and the even page.
                mbarrier.wait(bars.index(M_EVEN), phase)
                higher = gl.maximum(vectors.index(V_M_EVEN).load(LOGIT_ROWS), top)
                # 3: weights at the joint maximum.
                weights = gl.exp2(logits * scale - higher[:, None])
                shrink = gl.exp2(highest - higher)
                total = total * shrink + gl.sum(weights, axis=1)
                if FP8:
                    weights = weights * token_scale
                rounded = weights.to(gl.bfloat16)
                if number * P + P > length:
                    _blank(latent, number, length)
                # Into the place of the rope keys, which the logits are done with; releases `_even`.
                ropes.index(1).store(rounded)
                vectors.index(V_M_ODD).store(higher)
                fence_async_shared()
                mbarrier.arrive(bars.index(P_ODD), count=1)
                # 4: the right columns of what the odd page adds.
                highest = higher
                acc = acc * gl.convert_layout(shrink, OUT_ROWS)[:, None]
                operand = gl.convert_layout(rounded, WEIGHTS)
                acc = warpgroup_mma(operand, latent.slice(HALF, HALF, dim=1), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                # Nobody else reads the odd page's right half.
                mbarrier.arrive(bars.index(K_EMPTY + 3), count=1)
                # 5: `_even`'s weights, at the joint maximum already: nothing is to be scaled.
                mbarrier.wait(bars.index(P_EVEN), phase)
                acc = warpgroup_mma(ropes.index(zero), latents.index(zero).slice(HALF, HALF, dim=1), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                # `_even` finished its logits before P_EVEN: right half and rope keys' place go back to the loader.
                mbarrier.arrive(bars.index(K_EMPTY + 1), count=1)
                phase ^= 1
            # With `_even`'s arrival the loader may bring the next sequence's queries.
            mbarrier.arrive(bars.index(Q_EMPTY), count=1)
            # The divisor is over both groups' pages.
            vectors.index(V_L_ODD).store(total)
            mbarrier.arrive(bars.index(L_ODD), count=1)
            mbarrier.wait(bars.index(L_EVEN), q_phase)
            total += vectors.index(V_L_EVEN).load(LOGIT_ROWS)
            q_phase ^= 1
            _finish(acc, total, highest, begin, end, length, sequence, block, results, W, 1)


@gluon.jit
def _decode(
    query_desc, cache_desc, latent_ptr, scale_ptr, pages_ptr, lengths_ptr, shares_ptr, parts_ptr, lse_ptr, out_ptr,
    scale, pages_stride, latent_stride, scale_stride, W, H, S, FP8: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    block, part = gl.program_id(0), gl.program_id(1)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, C], SHARED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, R], SHARED)
    latents = gl.allocate_shared_memory(gl.bfloat16, [2, P, C], SHARED)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, P, R], SHARED)
    vectors = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)
    scales = gl.allocate_shared_memory(gl.float32, [2, P], VECTOR)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    # A barrier's phase ends with `count` arrivals and the bytes that were announced; all but these have one sender.
    for place in gl.static_range(BARRIERS):
        # Both warpgroups must be done with the queries; an FP8 page's halves with rope keys come two ways.
        if place == Q_EMPTY:
            mbarrier.init(bars.index(place), count=2)
        elif place == K_FULL + 1 or place == K_FULL + 2:
            mbarrier.init(bars.index(place), count=2 if FP8 else 1)
        else:
            mbarrier.init(bars.index(place), count=1)
    # The TMA must see the barriers as they are now.
    fence_async_shared()
    shares_ptr += part * 4
    schedule = (gl.load(shares_ptr), gl.load(shares_ptr + 1), gl.load(shares_ptr + 2), gl.load(shares_ptr + 3))
    results = (parts_ptr, lse_ptr, out_ptr, part)
    sources = (query_desc, cache_desc, latent_ptr, latent_stride, scale_ptr, scale_stride)
    buffers = (q_latent, q_rope, latents, ropes, vectors, scales)
    # The first runs in the program's own four warps, the others in four more each.
    gl.warp_specialize(
        [
            (load, (buffers, bars, sources, schedule, lengths_ptr, pages_ptr, pages_stride, block, W, FP8)),
            (_even, (buffers, bars, schedule, results, lengths_ptr, scale, block, W, H, S, FP8)),
            (_odd, (buffers, bars, schedule, results, lengths_ptr, scale, block, W, H, S, FP8)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def decode_kernel(
    query_BSHE: Tensor,
    cache: Entries,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    shares_Z4: Tensor,
    parts_2ZWC: Tensor,
    lse_2ZW: Tensor,
    out_BSHC: Tensor,
    *,
    scale_log2: float,
    rows_a_program: int,
) -> None:
    """Launch as `mla_decode_triton.decode_kernel` does; C is 512, R 64, the queries BF16."""
    assert rows_a_program == ROWS.value
    _, num_queries, num_heads, width = query_BSHE.shape
    rows = num_queries * num_heads
    tile = [TILE.value, TILE.value]
    fp8 = cache.scale_LP is not None
    in_bf16 = cache.rope_LPR if fp8 else cache.latent_LPC
    stride = in_bf16.stride(1)
    # All of an entry, or its rope keys alone: what the TMA brings.
    in_bf16 = in_bf16.as_strided((in_bf16.shape[0] * PAGE, R.value if fp8 else width), (stride, 1))
    query_desc = TensorDescriptor.from_tensor(query_BSHE.view(-1, width), tile, SHARED.value)
    cache_desc = TensorDescriptor.from_tensor(in_bf16, tile, SHARED.value)
    _decode[(triton.cdiv(rows, rows_a_program), shares_Z4.shape[0])](
        query_desc, cache_desc, cache.latent_LPC, cache.scale_LP, pages_BQ, lengths_B, shares_Z4,
        parts_2ZWC, lse_2ZW, out_BSHC, scale_log2, pages_BQ.stride(0), cache.latent_LPC.stride(1),
        cache.scale_LP.stride(1) if cache.scale_LP is not None else 0, rows, num_heads, num_queries, FP8=fp8,
        REGISTERS=FP8_REGISTERS if fp8 else REGISTERS, num_warps=4, maxnreg=168,
    )  # fmt: skip
