"""The Triton side of `teacher.parallel.exchange.symmetric_places`: stores to peers' memory, nothing planned, no host.

Nothing here waits for a peer: the barriers of `teacher.parallel.exchange.symmetric_places`, between the launches, are
what puts peers' stores before this rank's loads.

A peer's inbox is this rank's own inbox plus a distance out of a table. So, and not as an address of its own, the
compiler knows what 16 divides (buffers and rows begin at multiples of 16 bytes) and stores vectors of 16 bytes: from
addresses made of integers it made stores of single numbers. NVLink carries whole lines of 128 bytes best: rows of
numbers begin at multiples of 128 and are stored in vectors of 16 bytes a thread. Each rank begins with another peer,
and rows for different peers alternate, so that all links are busy all the time. Loads of experts are counted by atomic
additions of whole numbers, whose sum does not depend on their order.

Shape legend: as `teacher.parallel.exchange.fixed_places`; E experts, C copies that an expert may have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype, to_e4m3
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.quantise_triton import EXACT, LEAST, TILE, scales_of
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.model.fp8 import BLOCK
from teacher.parallel.exchange.symmetric_mailbox import SymmetricMailbox
from teacher.parallel.exchange.wire import RowLayout
from teacher.parallel.placement.placement import SlotTables

PLACES_A_PROGRAM = 32
SUM_BLOCK = 1_024
NUM_WARPS = 8


class Addresses(NamedTuple):
    """Numbers that make places of tokens, and ranks of slots."""

    rank: int
    num_ranks: int
    max_tokens: int
    slots_per_rank: int


@triton.jit
def peer_row(inbox_ptr, distances_ptr, peer, row, ROW_BYTES: tl.constexpr):
    """Address of `row` in the peer's inbox; the peer may be this rank."""
    distance = tl.multiple_of(tl.load(distances_ptr + peer), 16)
    return inbox_ptr + (distance + row.to(tl.int64) * ROW_BYTES)


@triton.jit
def typed(row_ptr, dtype: tl.constexpr):
    return row_ptr.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit(do_not_specialize=["rank", "max_tokens", "num_tokens"])
def _dispatch(
    x_ptr, x_scale_ptr, indices_ptr, weights_ptr, slots_of_ptr, num_copies_ptr, ranks_ptr,
    values_ptr, values_distances_ptr, headers_ptr, headers_distances_ptr,
    num_tokens, x_stride, x_scale_stride, most_copies, slots_per_rank, rank, num_ranks, max_tokens,
    PER_TOKEN: tl.constexpr, CHOICES: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
    HEADER_BYTES: tl.constexpr, SLOTS: tl.constexpr, WEIGHTS: tl.constexpr, TAIL: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    # Phase 1a: how many tokens come, to every peer, in the header of this rank's first place there.
    if first == 0:
        for peer in range(num_ranks):
            tail = peer_row(headers_ptr, headers_distances_ptr, peer, rank * max_tokens, HEADER_BYTES) + TAIL
            tl.store(typed(tail, tl.int32), num_tokens)
    k, groups = tl.arange(0, CHOICES), tl.arange(0, PADDED)
    real = k < PER_TOKEN
    columns = groups[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = columns < GROUPS * TILE
    # Phase 1b: a token at a time. At most `max_programs` programs, which go round.
    for token in range(first, num_tokens, tl.num_programs(0)):
        expert = tl.load(indices_ptr + token * PER_TOKEN + k, mask=real, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + token * PER_TOKEN + k, mask=real, other=0.0)
        # Copies of an expert take turns, as `SlotTables.choose` has it.
        turn = (token + rank) % tl.load(num_copies_ptr + expert)
        slot = tl.load(slots_of_ptr + expert * most_copies + turn).to(tl.int32)
        peer_of = tl.where(real, slot // slots_per_rank, num_ranks)
        x = tl.load(x_ptr + token * x_stride.to(tl.int64) + columns, mask=inside, other=0)
        if QUANTISED:
            values = x
            scale_inv = tl.load(x_scale_ptr + groups * x_scale_stride + token, mask=groups < GROUPS, other=0.0)
        else:
            x = x.to(tl.float32)
            scale_inv, scale = scales_of(tl.maximum(tl.max(tl.abs(x), axis=1), LEAST), False)
            values = to_e4m3(x * scale[:, None]).to(tl.uint8, bitcast=True)
        # Quantised once, stored from registers to as many ranks as need it.
        ranks = 0
        for nth in range(num_ranks):
            # Every rank begins with its right neighbour, so that no inbox is everybody's first.
            peer = (rank + 1 + nth) % num_ranks
            place = rank * max_tokens + token
            header = peer_row(headers_ptr, headers_distances_ptr, peer, place, HEADER_BYTES)
            # Slots go to every rank, as nobody clears inboxes: a place whose slots are all other ranks' is empty.
            tl.store(typed(header + SLOTS, tl.int32) + k, slot, mask=real)
            # The rest goes only where an expert of the token's lives, once however many do.
            if tl.sum((peer_of == peer).to(tl.int32), axis=0) > 0:
                tl.store(typed(header + WEIGHTS, tl.float32) + k, weight, mask=real)
                tl.store(typed(header, tl.float32) + groups, scale_inv, mask=groups < GROUPS)
                row = peer_row(values_ptr, values_distances_ptr, peer, place, GROUPS * TILE)
                tl.store(row + columns, values, mask=inside)
                ranks += 1 << peer
        tl.store(ranks_ptr + token, ranks)


@triton.jit(do_not_specialize=["first_slot", "max_tokens"])
def _receive(
    headers_ptr, indices_ptr, weights_ptr, load_ptr, scales_ptr,
    num_places, max_tokens, first_slot, slots_per_rank, scales_stride,
    PER_TOKEN: tl.constexpr, CHOICES: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr,
    ROW_WORDS: tl.constexpr, SLOTS: tl.constexpr, WEIGHTS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    real = place < num_places
    row = place.to(tl.int64)[:, None] * ROW_WORDS
    # Phase 2, behind the barrier. Places beyond the sender's count, in its first header, hold an earlier batch's.
    first_row = (place // max_tokens * max_tokens).to(tl.int64) * ROW_WORDS
    filled = place % max_tokens < tl.load(headers_ptr + first_row + TAIL, mask=real, other=0)
    k, groups = tl.arange(0, CHOICES), tl.arange(0, PADDED)
    inside = real[:, None] & (k[None, :] < PER_TOKEN)
    slot = tl.load(headers_ptr + row + SLOTS + k[None, :], mask=inside, other=-1) - first_slot
    # Values are not looked at: the experts read the rows of `own` choices alone, in the inbox itself.
    own = inside & filled[:, None] & (slot >= 0) & (slot < slots_per_rank)
    out = place[:, None] * PER_TOKEN + k[None, :]
    tl.store(indices_ptr + out, tl.where(own, slot, -1), mask=inside)
    weight = tl.load(headers_ptr + row + WEIGHTS + k[None, :], mask=own, other=0).to(tl.float32, bitcast=True)
    tl.store(weights_ptr + out, weight, mask=inside)
    tl.atomic_add(load_ptr + tl.where(own, slot, 0), 1, mask=own, sem="relaxed")
    within = real[:, None] & (groups[None, :] < GROUPS)
    scale = tl.load(headers_ptr + row + groups[None, :], mask=within, other=0).to(tl.float32, bitcast=True)
    tl.store(scales_ptr + groups[None, :] * scales_stride + place[:, None], scale, mask=within)


@triton.jit(do_not_specialize=["rank", "max_tokens"])
def _return(
    out_ptr, indices_ptr, inbox_ptr, distances_ptr, num_places, rank, num_ranks, max_tokens,
    PER_TOKEN: tl.constexpr, CHOICES: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k, columns = tl.arange(0, CHOICES), tl.arange(0, COLUMNS)
    # Phase 3. Programs that run at one time store to different peers in turn: all links are busy at once.
    for nth in range(tl.program_id(0), num_places, tl.num_programs(0)):
        peer, token = (rank + 1 + nth) % num_ranks, nth // num_ranks
        place = peer * max_tokens + token
        slot = tl.load(indices_ptr + place * PER_TOKEN + k, mask=k < PER_TOKEN, other=-1)
        # Only rows of which an expert here made something. The origin knows from `ranks` of the dispatch which come.
        if tl.max(slot, axis=0) >= 0:
            out = tl.load(out_ptr + place.to(tl.int64) * HIDDEN + columns, mask=columns < HIDDEN)
            row = peer_row(inbox_ptr, distances_ptr, peer, rank * max_tokens + token, HIDDEN * 2)
            tl.store(
                typed(row, tl.bfloat16) + columns, to_dtype(out.to(tl.float32), tl.bfloat16), mask=columns < HIDDEN
            )


@triton.jit(do_not_specialize=["max_tokens"])
def _sum(rows_ptr, ranks_ptr, out_ptr, num_ranks, max_tokens, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    ranks = tl.load(ranks_ptr + token)
    total = tl.zeros((COLUMNS,), tl.float32)
    # Phase 4, behind the second barrier: rows of ranks that the token did not go to hold an earlier batch's numbers.
    for rank in range(num_ranks):
        if (ranks >> rank) & 1:
            place = (rank * max_tokens + token).to(tl.int64)
            total += tl.load(rows_ptr + place * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + columns, to_dtype(total, tl.bfloat16), mask=inside)


def dispatch_kernel(
    x: Tensor | Quantised,
    indices_NK: Tensor,
    weights_NK: Tensor,
    tables: SlotTables,
    addresses: Addresses,
    header: RowLayout,
    *,
    values: SymmetricMailbox,
    headers: SymmetricMailbox,
    max_programs: int | None,
) -> Tensor:
    """Tokens and their headers to their places at the peers; which ranks each went to, int32 [N]."""
    (num_tokens, per_token), groups = indices_NK.shape, header.hidden // BLOCK
    ranks_N = torch.empty(num_tokens, dtype=torch.int32, device=indices_NK.device)
    quantised = isinstance(x, Quantised)
    rows = x.values_MK.view(torch.uint8) if isinstance(x, Quantised) else x
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    scales = x.scale_inv_MG if isinstance(x, Quantised) else None
    # Without tokens, one program says so to the peers.
    _dispatch[(min(max(1, num_tokens), max_programs or max(1, num_tokens)),)](
        rows, scales, indices_NK, weights_NK, tables.slots_EC, tables.num_copies_E, ranks_N,
        values.inbox_QB, values.distances_R, headers.inbox_QB, headers.distances_R,
        num_tokens, rows.stride(0), 0 if scales is None else scales.stride(1), tables.slots_EC.shape[1],
        addresses.slots_per_rank, addresses.rank, addresses.num_ranks, addresses.max_tokens,
        PER_TOKEN=per_token, CHOICES=triton.next_power_of_2(per_token), GROUPS=groups,
        PADDED=triton.next_power_of_2(groups), HEADER_BYTES=header.row_bytes, SLOTS=header.scales,
        WEIGHTS=header.slots, TAIL=header.weights, QUANTISED=quantised, num_warps=NUM_WARPS, **EXACT,
    )  # fmt: skip
    return ranks_N


def receive_kernel(headers_QB: Tensor, header: RowLayout, addresses: Addresses) -> tuple[Choice, Tensor]:
    """(the choice restricted to this rank's slots, scales [Q, G] by column)."""
    num_places, device = headers_QB.shape[0], headers_QB.device
    per_token, groups = (header.slots - header.scales) // 4, header.hidden // BLOCK
    choice = Choice(
        torch.empty(num_places, per_token, dtype=torch.int32, device=device),
        torch.empty(num_places, per_token, dtype=torch.float32, device=device),
        torch.zeros(addresses.slots_per_rank, dtype=torch.int32, device=device),
    )
    scales = empty_scales(num_places, groups, device)
    _receive[(triton.cdiv(num_places, PLACES_A_PROGRAM),)](
        headers_QB.view(torch.int32), *choice, scales, num_places, addresses.max_tokens,
        addresses.rank * addresses.slots_per_rank, addresses.slots_per_rank, scales.stride(1),
        PER_TOKEN=per_token, CHOICES=triton.next_power_of_2(per_token), GROUPS=groups,
        PADDED=triton.next_power_of_2(groups), PLACES=PLACES_A_PROGRAM, ROW_WORDS=header.row_bytes // 4,
        SLOTS=header.scales // 4, WEIGHTS=header.slots // 4, TAIL=header.weights // 4,
    )  # fmt: skip
    return choice, scales


def return_kernel(
    out_QD: Tensor, indices_QK: Tensor, addresses: Addresses, returned: SymmetricMailbox, max_programs: int | None
) -> None:
    """Rows that have a choice here to the ranks they came from, in BF16."""
    (num_places, hidden), per_token = out_QD.shape, indices_QK.shape[1]
    _return[(min(num_places, max_programs or num_places),)](
        out_QD, indices_QK, returned.inbox_QB, returned.distances_R, num_places, addresses.rank, addresses.num_ranks,
        addresses.max_tokens, PER_TOKEN=per_token, CHOICES=triton.next_power_of_2(per_token), HIDDEN=hidden,
        COLUMNS=triton.next_power_of_2(hidden), num_warps=NUM_WARPS,
    )  # fmt: skip


def sum_kernel(returned_QD: Tensor, ranks_N: Tensor, addresses: Addresses) -> Tensor:
    """Each token's rows, one a rank it went to, added in the order of the ranks: BF16 [N, D]."""
    num_tokens, hidden = len(ranks_N), returned_QD.shape[1]
    out_ND = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=returned_QD.device)
    if num_tokens:
        _sum[(num_tokens, triton.cdiv(hidden, SUM_BLOCK))](
            returned_QD, ranks_N, out_ND, addresses.num_ranks, addresses.max_tokens, HIDDEN=hidden, COLUMNS=SUM_BLOCK
        )
    return out_ND
