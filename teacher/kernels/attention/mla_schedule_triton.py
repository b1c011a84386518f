"""The Triton side of `teacher.kernels.attention.mla_schedule`: a program takes one share, and all read all lengths.

Shape legend: B sequences, Z shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import START_PAGES, DecodeSchedule

P = tl.constexpr(PAGE)
START = tl.constexpr(START_PAGES)


@triton.jit
def _schedule(lengths_ptr, shares_ptr, sequences_ptr, num_sequences, Z: tl.constexpr, B_PADDED: tl.constexpr):
    number = tl.program_id(0)
    sequences = tl.arange(0, B_PADDED)
    inside = sequences < num_sequences
    # Every program lays all sequences on the line, so that none waits for another.
    pages = (tl.load(lengths_ptr + sequences, mask=inside, other=0) + P - 1) // P
    units = tl.where(pages > 0, (pages + 1) // 2 * 2 + START, 0)
    ends = tl.cumsum(units, axis=0)
    starts = ends - units + START
    total = tl.sum(units, axis=0)
    # As many shares as programs, of equal length, an even number of pages each.
    share = tl.maximum((total + 2 * Z - 1) // (2 * Z) * 2, 2)
    begin = number * share
    end = tl.minimum(begin + share, total)
    # This share's ends on the line: which sequences they lie in, and at which of their pages.
    first = tl.sum((inside & (ends <= begin)).to(tl.int32), axis=0)
    last = tl.sum((inside & (ends <= end - 1)).to(tl.int32), axis=0)
    first_page = begin - tl.sum(tl.where(sequences == first, starts, 0), axis=0)
    last_page = end - tl.sum(tl.where(sequences == last, starts, 0), axis=0)
    last_page = tl.minimum(tl.maximum(last_page, 0), tl.sum(tl.where(sequences == last, pages, 0), axis=0))
    idle = begin >= end
    shares_ptr += number * 4
    tl.store(shares_ptr, tl.where(idle, 0, first))
    tl.store(shares_ptr + 1, tl.where(idle, 0, tl.maximum(first_page, 0)))
    tl.store(shares_ptr + 2, tl.where(idle, -1, last))
    tl.store(shares_ptr + 3, tl.where(idle, 0, last_page))
    # How many shares each sequence spans, for `mla_combine_triton`; one program says it.
    if number == 0:
        firsts = starts // share
        tl.store(sequences_ptr + sequences * 2, firsts, mask=inside)
        shares_a_sequence = tl.where(pages > 0, (ends - 1) // share - firsts + 1, 0)
        tl.store(sequences_ptr + sequences * 2 + 1, shares_a_sequence, mask=inside)


def schedule_decode_kernel(lengths_B: Tensor, num_shares: int) -> DecodeSchedule:
    """Launch `schedule_decode` for int32 [B]; the host reads nothing."""
    num_sequences = lengths_B.numel()
    shares = torch.empty(num_shares, 4, dtype=torch.int32, device=lengths_B.device)
    sequences = torch.empty(num_sequences, 2, dtype=torch.int32, device=lengths_B.device)
    _schedule[(num_shares,)](
        lengths_B, shares, sequences, num_sequences, Z=num_shares, B_PADDED=triton.next_power_of_2(num_sequences)
    )
    return DecodeSchedule(shares, sequences)
