"""The loader of `mla_decode_gluon`: it brings queries and pages into shared memory while two warpgroups compute.

A page has a place for even and one for odd pages; each is loaded and given back in two halves of its columns, in the
order in which the warpgroups are done with them, so that the next pair is on its way before this one is finished.
BF16 pages come through the TMA. FP8 pages come through registers, where they turn BF16.

Shape legend: B sequences, W rows (queries times heads), C latent, R rope, P positions a page.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from teacher.kernels.attention.mla_cache import PAGE

P = gl.constexpr(PAGE)
ROWS = gl.constexpr(64)
C = gl.constexpr(512)
R = gl.constexpr(64)
HALF = gl.constexpr(256)
TILE = gl.constexpr(64)  # columns of a tile in shared memory: 128 bytes, the swizzle's width
BYTES = gl.constexpr(2)
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# Eight threads fill a row of a tile, without a bank conflict.
THREADS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
THREAD_ROWS = gl.constexpr(gl.SliceLayout(1, THREADS))
THREAD_COLUMNS = gl.constexpr(gl.SliceLayout(0, THREADS))

# Barriers: the queries and the halves (place * 2 + half) are there, or may be overwritten; `mla_decode_gluon` has more.
Q_FULL, Q_EMPTY, K_FULL, K_EMPTY = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(6)


@gluon.jit
def share_of(schedule, lengths_ptr, sequence):
    """This program's pages of one sequence, [begin, end). Of the last sequence they are known before its length is."""
    first, begin_page, last, end_page = schedule
    begin = gl.where(sequence == first, begin_page, 0)
    end = end_page
    if sequence != last:
        end = (gl.load(lengths_ptr + sequence) + P - 1) // P
    return begin, end


@gluon.jit
def _ask_for(page, source, wanted):
    """Let the L2 cache bring a page's entries; one thread asks for all of them."""
    entries_ptr, stride = source
    BYTES_A_NUMBER: gl.constexpr = entries_ptr.dtype.element_ty.primitive_bitwidth // 8
    gl.inline_asm_elementwise(
        """{
        .reg .pred asks;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 asks, thread, 0;
        setp.ne.and.s32 asks, $3, 0, asks;
        @asks cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [(entries_ptr + page.to(gl.int64) * (P * stride)).to(gl.int64), P * stride * BYTES_A_NUMBER, wanted],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load(buffers, bars, sources, schedule, lengths_ptr, pages_ptr, pages_stride, block, W, FP8: gl.constexpr):
    """Bring each sequence's queries, and its pages in pairs, as the warpgroups give their places back."""
    q_latent, q_rope = buffers[0], buffers[1]
    query_desc, entries = sources[0], (sources[2], sources[3])
    # A wait for the phase before the first one returns at once: at first every place is empty.
    q_phase = 1
    k_phase = 1
    for sequence in range(schedule[0], schedule[2] + 1):
        begin, end = share_of(schedule, lengths_ptr, sequence)
        if begin < end:
            pages = pages_ptr + sequence * pages_stride
            even = gl.load(pages + begin)
            # Beyond an odd number of pages the last one comes again, to be hidden.
            odd = gl.load(pages + gl.minimum(begin + 1, end - 1))
            # Both warpgroups are through with the logits of the sequence before.
            mbarrier.wait(bars.index(Q_EMPTY), q_phase)
            q_phase ^= 1
            mbarrier.expect(bars.index(Q_FULL), ROWS * (C + R) * BYTES)
            row = sequence * W + block * ROWS
            for tile in gl.static_range(C // TILE):
                view = q_latent.index(0).slice(tile * TILE, TILE, dim=1)
                tma.async_copy_global_to_shared(query_desc, [row, tile * TILE], bars.index(Q_FULL), view)
            tma.async_copy_global_to_shared(query_desc, [row, C], bars.index(Q_FULL), q_rope.index(0))
            for number in range(begin, end, 2):
                # Page numbers a pair ahead, and the pages on their way into the L2 while this pair is still in use.
                next_even = gl.load(pages + gl.minimum(number + 2, end - 1))
                next_odd = gl.load(pages + gl.minimum(number + 3, end - 1))
                _ask_for(next_even, entries, (number + 2 < end).to(gl.int32))
                _ask_for(next_odd, entries, (number + 3 < end).to(gl.int32))
                # In the order in which the halves are given back (K_EMPTY): a group multiplies by its own page first,
                # then by the other's. Rope keys come with the halves given back last: till then weights lie there.
                if FP8:
                    _convert_pair(buffers, bars, sources, even * P, odd * P, k_phase)
                else:
                    _copy_half(buffers, bars, sources[1], 0, 0, even * P, k_phase, False)
                    _copy_half(buffers, bars, sources[1], 1, 1, odd * P, k_phase, False)
                    _copy_half(buffers, bars, sources[1], 1, 0, odd * P, k_phase, True)
                    _copy_half(buffers, bars, sources[1], 0, 1, even * P, k_phase, True)
                even, odd = next_even, next_odd
                k_phase ^= 1


@gluon.jit
def _copy_half(
    buffers, bars, cache_desc, place: gl.constexpr, half: gl.constexpr, row, phase, with_rope: gl.constexpr
):  # fmt: skip
    latent = buffers[2].index(place)
    full = bars.index(K_FULL + place * 2 + half)
    # The one group that reads this half last has given it back.
    mbarrier.wait(bars.index(K_EMPTY + place * 2 + half), phase)
    # The barrier lets the groups go on when all these bytes have come.
    mbarrier.expect(full, P * HALF * BYTES + (P * R * BYTES if with_rope else 0))
    for tile in gl.static_range(HALF // TILE):
        view = latent.slice(half * HALF + tile * TILE, TILE, dim=1)
        tma.async_copy_global_to_shared(cache_desc, [row, half * HALF + tile * TILE], full, view)
    if with_rope:
        tma.async_copy_global_to_shared(cache_desc, [row, C], full, buffers[3].index(place))


@gluon.jit
def _convert_pair(buffers, bars, sources, even, odd, phase):
    """Each half is on its way to registers before the place of the one before it is free."""
    left_even = _fetch(sources, even, 0)
    right_odd = _fetch(sources, odd, 1)
    _convert_half(buffers, bars, sources, 0, 0, even, left_even, phase, False)
    left_odd = _fetch(sources, odd, 0)
    _convert_half(buffers, bars, sources, 1, 1, odd, right_odd, phase, False)
    right_even = _fetch(sources, even, 1)
    _convert_half(buffers, bars, sources, 1, 0, odd, left_odd, phase, True)
    _convert_half(buffers, bars, sources, 0, 1, even, right_even, phase, True)


@gluon.jit
def _fetch(sources, row, half: gl.constexpr):
    """Half of a page's latent, as four tiles of E4M3."""
    latent_ptr, latent_stride = sources[2], sources[3]
    rows = (row + gl.arange(0, P, THREAD_ROWS)).to(gl.int64)
    pointers = latent_ptr + rows[:, None] * latent_stride + gl.arange(0, TILE, THREAD_COLUMNS)[None, :] + half * HALF
    return (
        gl.load(pointers),
        gl.load(pointers + TILE),
        gl.load(pointers + 2 * TILE),
        gl.load(pointers + 3 * TILE),
    )


@gluon.jit
def _convert_half(
    buffers, bars, sources, place: gl.constexpr, half: gl.constexpr, row, fetched, phase, with_rope: gl.constexpr
):  # fmt: skip
    rope_desc, scale_ptr, scale_stride = sources[1], sources[4], sources[5]
    latent = buffers[2].index(place)
    full = bars.index(K_FULL + place * 2 + half)
    if with_rope:
        rows = row + gl.arange(0, P, THREAD_ROWS)
        scales = gl.load(scale_ptr + rows.to(gl.int64) * scale_stride)
    mbarrier.wait(bars.index(K_EMPTY + place * 2 + half), phase)
    if with_rope:
        # One of two arrivals (the other is below): this half is full when its numbers and its rope keys are there.
        mbarrier.expect(full, P * R * BYTES)
        tma.async_copy_global_to_shared(rope_desc, [row, 0], full, buffers[3].index(place))
        buffers[5].index(place).store(scales)
    for tile in gl.static_range(HALF // TILE):
        latent.slice(half * HALF + tile * TILE, TILE, dim=1).store(fetched[tile].to(gl.bfloat16))
    # Stored by threads, read by the tensor cores: the fence puts the one before the other; then the groups may go on.
    fence_async_shared()
    mbarrier.arrive(full, count=1)
