"""The Triton side of `teacher.parallel.symmetric`: stores to peers' memory by address, no atomics, no host.

A peer's inbox is this rank's own inbox plus a distance out of a table. So, and not as an address of its own, the
compiler knows what 16 divides (buffers and rows begin at multiples of 16 bytes) and stores vectors of 16 bytes: from
addresses made of integers it made stores of single numbers.

Shape legend: as `teacher.parallel.low_latency`; C copies of the most replicated expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype, to_e4m3
from teacher.kernels.quantise_triton import EXACT, LEAST, TILE, scales_of
from teacher.parallel.placement import SlotTables
from teacher.parallel.wire import RowLayout

TOKENS_A_BLOCK = 256  # that a program plans
SUM_BLOCK = 1_024
RECEIVE_BLOCK = 64


class Lot(NamedTuple):
    """A mailbox as a sender sees it: its own inbox, and the distance in bytes to each rank's, int64."""

    parts: RowLayout
    capacity: int
    rank: int
    num_ranks: int
    inbox_QB: Tensor
    distances_R: Tensor


class Planned(NamedTuple):
    """int32. Slots and, for a choice that calls for a copy, which of its block's to that peer, else -1: [N, K]. The
    copies of each block of TOKENS_A_BLOCK tokens to each peer: [blocks, R]."""

    slots_NK: Tensor
    nths_NK: Tensor
    counts_BR: Tensor


@triton.jit
def peer_row(inbox_ptr, distances_ptr, peer, row, ROW_BYTES: tl.constexpr):
    """Address of `row` in the peer's inbox; the peer may be this rank."""
    distance = tl.multiple_of(tl.load(distances_ptr + peer), 16)
    return inbox_ptr + (distance + row.to(tl.int64) * ROW_BYTES)


@triton.jit
def typed(row_ptr, dtype: tl.constexpr):
    return row_ptr.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit(do_not_specialize=["rank"])
def _plan(
    indices_ptr, slots_of_ptr, num_copies_ptr, slots_ptr, nths_ptr, counts_ptr,
    num_tokens, per_token, most_copies, slots_per_rank, rank, num_ranks,
    TOKENS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """A block of tokens: slots, which of the block's copies to a peer each choice calls for, and how many there are."""
    block = tl.program_id(0)
    n, k = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHOICES)
    inside = (n[:, None] < num_tokens) & (k[None, :] < per_token)
    pairs = n[:, None] * per_token + k[None, :]
    expert = tl.load(indices_ptr + pairs, mask=inside, other=0).to(tl.int64)
    turn = (n[:, None] + rank) % tl.load(num_copies_ptr + expert)
    slot = tl.load(slots_of_ptr + expert * most_copies + turn)
    tl.store(slots_ptr + pairs, slot.to(tl.int32), mask=inside)
    peer_of = tl.where(inside, slot // slots_per_rank, num_ranks).to(tl.int32)
    nths = tl.full((TOKENS, CHOICES), -1, tl.int32)
    for peer in range(num_ranks):
        to_peer = (peer_of == peer).to(tl.int32)
        token = tl.max(to_peer, axis=1)
        nth = tl.cumsum(token, axis=0) - 1
        # One copy a peer: the first of the token's choices that lives there calls for it.
        first = (to_peer == 1) & (tl.cumsum(to_peer, axis=1) == 1)
        nths = tl.where(first, nth[:, None], nths)
        tl.store(counts_ptr + block * num_ranks + peer, tl.sum(token))
    tl.store(nths_ptr + pairs, nths, mask=inside)


@triton.jit
def _tails(
    counts_ptr, inbox_ptr, distances_ptr, rank, num_ranks, capacity, num_blocks,
    BLOCKS: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Tell every peer how many come, and whether any peer is sent more than there is room for."""
    blocks = tl.arange(0, BLOCKS)
    overflowed = rank * 0
    for peer in range(num_ranks):
        count = tl.sum(tl.load(counts_ptr + blocks * num_ranks + peer, mask=blocks < num_blocks, other=0))
        overflowed = tl.maximum(overflowed, (count > capacity).to(tl.int32))
        row = peer_row(inbox_ptr, distances_ptr, peer, rank * capacity, ROW_BYTES) + TAIL
        tl.store(typed(row, tl.int32), count)
    for peer in range(num_ranks):
        row = peer_row(inbox_ptr, distances_ptr, peer, rank * capacity, ROW_BYTES) + TAIL + 4
        tl.store(typed(row, tl.int32), overflowed)


@triton.jit(do_not_specialize=["rank", "capacity"])
def _dispatch(
    x_ptr, slots_ptr, nths_ptr, counts_ptr, weights_ptr, places_ptr, inbox_ptr, distances_ptr,
    rank, num_ranks, capacity, num_tokens, per_token, slots_per_rank, num_blocks,
    HIDDEN: tl.constexpr, GROUPS: tl.constexpr, CHOICES: tl.constexpr, ROW_BYTES: tl.constexpr,
    NUMBERS: tl.constexpr, SCALES: tl.constexpr, SLOTS: tl.constexpr, TAIL: tl.constexpr, FP8: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if token == 0:
        _tails(counts_ptr, inbox_ptr, distances_ptr, rank, num_ranks, capacity, num_blocks, BLOCKS, ROW_BYTES, TAIL)
    k = tl.arange(0, CHOICES)
    real = (token + k * 0 < num_tokens) & (k < per_token)
    slots = tl.load(slots_ptr + token * per_token + k, mask=real, other=0)
    weights = tl.load(weights_ptr + token * per_token + k, mask=real, other=0.0)
    nths = tl.load(nths_ptr + token * per_token + k, mask=real, other=-1)
    peers = slots // slots_per_rank
    blocks = tl.arange(0, BLOCKS)[:, None]
    earlier = (blocks < token // TOKENS) & (nths[None, :] >= 0)
    before = tl.sum(tl.load(counts_ptr + blocks * num_ranks + peers[None, :], mask=earlier, other=0), axis=0)
    nths = tl.where((nths >= 0) & (nths + before < capacity), nths + before, -1)
    tl.store(
        places_ptr + token * per_token + k, tl.where(nths >= 0, peers * capacity + nths, -1).to(tl.int64), mask=real
    )
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = columns < HIDDEN
    there = inside & (token + columns * 0 < num_tokens)
    x = tl.load(x_ptr + token.to(tl.int64) * HIDDEN + columns, mask=there, other=0.0)
    if FP8:
        scale_inv, scale = scales_of(tl.maximum(tl.max(tl.abs(x.to(tl.float32)), axis=1), LEAST), False)
        numbers = to_e4m3(x.to(tl.float32) * scale[:, None])
    for choice in range(per_token):
        nth = tl.max(tl.where(k == choice, nths, -1), axis=0)
        if nth >= 0:
            peer = tl.max(tl.where(k == choice, peers, 0), axis=0)
            row = peer_row(inbox_ptr, distances_ptr, peer, rank * capacity + nth, ROW_BYTES)
            if FP8:
                tl.store(typed(row, tl.float8e4nv) + columns, numbers, mask=inside)
                tl.store(typed(row + NUMBERS, tl.float32) + groups, scale_inv, mask=groups * TILE < HIDDEN)
            else:
                tl.store(typed(row, tl.bfloat16) + columns, x, mask=inside)
            tl.store(typed(row + SCALES, tl.int32) + k, slots, mask=real)
            tl.store(typed(row + SLOTS, tl.float32) + k, weights, mask=real)


@triton.jit
def _receive(
    rows_ptr, filled_ptr, slots_ptr, weights_ptr, overflowed_ptr,
    num_places, capacity, per_token, first_slot, slots_per_rank, num_ranks,
    PLACES: tl.constexpr, CHOICES: tl.constexpr, RANKS: tl.constexpr, ROW_WORDS: tl.constexpr,
    SCALES: tl.constexpr, SLOTS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    real = place < num_places
    count = tl.load(rows_ptr + (place // capacity * capacity).to(tl.int64) * ROW_WORDS + TAIL, mask=real, other=0)
    filled = place % capacity < count
    tl.store(filled_ptr + place, filled.to(tl.int8), mask=real)
    k = tl.arange(0, CHOICES)
    inside = real[:, None] & (k[None, :] < per_token)
    row = place.to(tl.int64)[:, None] * ROW_WORDS + k[None, :]
    slot = tl.load(rows_ptr + row + SCALES, mask=inside, other=-1) - first_slot
    own = filled[:, None] & (slot >= 0) & (slot < slots_per_rank)
    out = place[:, None] * per_token + k[None, :]
    tl.store(slots_ptr + out, tl.where(own, slot, -1).to(tl.int64), mask=inside)
    weight = tl.load(rows_ptr + row + SLOTS, mask=inside, other=0).to(tl.float32, bitcast=True)
    tl.store(weights_ptr + out, tl.where(own, weight, 0.0), mask=inside)
    if tl.program_id(0) == 0:
        r = tl.arange(0, RANKS)
        flags = tl.load(rows_ptr + (r * capacity).to(tl.int64) * ROW_WORDS + TAIL + 1, mask=r < num_ranks, other=0)
        before = tl.load(overflowed_ptr).to(tl.int32)
        tl.store(overflowed_ptr, tl.maximum(before, tl.max(flags, axis=0)).to(tl.int8))


@triton.jit(do_not_specialize=["rank", "capacity"])
def _return(
    out_ptr, rows_ptr, inbox_ptr, distances_ptr, rank, capacity,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROW_WORDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    peer, nth = place // capacity, place % capacity
    if nth < tl.load(rows_ptr + (peer * capacity).to(tl.int64) * ROW_WORDS + TAIL):
        columns = tl.arange(0, COLUMNS)
        out = tl.load(out_ptr + place.to(tl.int64) * HIDDEN + columns, mask=columns < HIDDEN)
        row = peer_row(inbox_ptr, distances_ptr, peer, rank * capacity + nth, HIDDEN * 2)
        target = typed(row, tl.bfloat16)
        tl.store(target + columns, to_dtype(out.to(tl.float32), tl.bfloat16), mask=columns < HIDDEN)


@triton.jit
def _sum(rows_ptr, places_ptr, out_ptr, per_token, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(per_token):
        place = tl.load(places_ptr + token * per_token + k)
        if place >= 0:
            total += tl.load(rows_ptr + place.to(tl.int64) * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + columns, total, mask=inside)


def plan_kernel(indices_NK: Tensor, tables: SlotTables, slots_per_rank: int, rank: int, num_ranks: int) -> Planned:
    """Do as `SlotTables.choose` and `plan.find_copies`, block by block."""
    num_tokens, per_token = indices_NK.shape
    num_blocks = max(triton.cdiv(num_tokens, TOKENS_A_BLOCK), 1)
    slots_NK, nths_NK = (torch.empty(indices_NK.shape, dtype=torch.int32, device=indices_NK.device) for _ in range(2))
    counts_BR = torch.empty(num_blocks, num_ranks, dtype=torch.int32, device=indices_NK.device)
    _plan[(num_blocks,)](
        indices_NK.contiguous(), tables.slots_EC, tables.num_copies_E, slots_NK, nths_NK, counts_BR,
        num_tokens, per_token, tables.slots_EC.shape[1], slots_per_rank, rank, num_ranks,
        TOKENS=TOKENS_A_BLOCK, CHOICES=triton.next_power_of_2(per_token), num_warps=8,
    )  # fmt: skip
    return Planned(slots_NK, nths_NK, counts_BR)


def dispatch_kernel(x_ND: Tensor, weights_NK: Tensor, planned: Planned, slots_per_rank: int, lot: Lot) -> Tensor:
    """BF16 tokens to their places at the peers, as `wire.pack` writes them, and counts. Returns the places [N, K]."""
    parts, (num_tokens, per_token) = lot.parts, weights_NK.shape
    places_NK = torch.empty(num_tokens, per_token, dtype=torch.int64, device=x_ND.device)
    num_blocks = planned.counts_BR.shape[0]
    _dispatch[(max(num_tokens, 1),)](
        x_ND, planned.slots_NK, planned.nths_NK, planned.counts_BR, weights_NK.float().contiguous(), places_NK,
        lot.inbox_QB, lot.distances_R,
        lot.rank, lot.num_ranks, lot.capacity, num_tokens, per_token, slots_per_rank, num_blocks,
        HIDDEN=parts.hidden, GROUPS=triton.next_power_of_2(triton.cdiv(parts.hidden, TILE.value)),
        CHOICES=triton.next_power_of_2(per_token), ROW_BYTES=parts.row_bytes, NUMBERS=parts.numbers,
        SCALES=parts.scales, SLOTS=parts.slots, TAIL=parts.weights, FP8=parts.form == "fp8",
        TOKENS=TOKENS_A_BLOCK, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=8, **EXACT,
    )  # fmt: skip
    return places_NK


def receive_kernel(
    rows_QB: Tensor, parts: RowLayout, capacity: int, first_slot: int, slots_per_rank: int, overflowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(which places are filled, local slots, weights); `overflowed` is raised where a sender says so."""
    num_places, per_token = rows_QB.shape[0], (parts.slots - parts.scales) // 4
    filled_Q = torch.empty(num_places, dtype=torch.bool, device=rows_QB.device)
    slots_MK = torch.empty(num_places, per_token, dtype=torch.int64, device=rows_QB.device)
    weights_MK = torch.empty(num_places, per_token, dtype=torch.float32, device=rows_QB.device)
    num_ranks = num_places // capacity
    _receive[(triton.cdiv(num_places, RECEIVE_BLOCK),)](
        rows_QB.view(torch.int32), filled_Q.view(torch.int8), slots_MK, weights_MK, overflowed.view(torch.int8),
        num_places, capacity, per_token, first_slot, slots_per_rank, num_ranks,
        PLACES=RECEIVE_BLOCK, CHOICES=triton.next_power_of_2(per_token), RANKS=triton.next_power_of_2(num_ranks),
        ROW_WORDS=parts.row_bytes // 4, SCALES=parts.scales // 4, SLOTS=parts.slots // 4, TAIL=parts.weights // 4,
    )  # fmt: skip
    return filled_Q, slots_MK, weights_MK


def return_kernel(out_QD: Tensor, rows_QB: Tensor, parts: RowLayout, lot: Lot) -> None:
    """Filled places' results to the ranks they came from, in BF16."""
    num_places, hidden = out_QD.shape
    _return[(num_places,)](
        out_QD, rows_QB.view(torch.int32), lot.inbox_QB, lot.distances_R, lot.rank, lot.capacity,
        HIDDEN=hidden, COLUMNS=triton.next_power_of_2(hidden), ROW_WORDS=parts.row_bytes // 4,
        TAIL=parts.weights // 4, num_warps=8,
    )  # fmt: skip


def sum_kernel(rows_QD: Tensor, places_NK: Tensor) -> Tensor:
    """Sum as `plan.sum_copies` does, FP32 [N, D]."""
    (num_tokens, per_token), hidden = places_NK.shape, rows_QD.shape[1]
    out_ND = torch.empty(num_tokens, hidden, dtype=torch.float32, device=rows_QD.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(hidden, SUM_BLOCK))
        _sum[grid](rows_QD, places_NK, out_ND, per_token, HIDDEN=hidden, COLUMNS=SUM_BLOCK)
    return out_ND
