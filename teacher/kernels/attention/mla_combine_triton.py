"""Join what shares left of a sequence that spans several: a mean weighted by each part's exponential sum, from its
logarithm (log-sum-exp, as in Flash-Decoding). Parts are summed in the order of the context, so results repeat.

A share z leaves at most two parts: that of a sequence begun before it (part 2z) and that of one begun in it (2z + 1).

Shape legend: B sequences, W rows (queries times heads), C latent, Z shares.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype
from teacher.kernels.attention.reference import DecodeSchedule

ELEMENTS = 4096  # of parts read at once by a program: 32 registers a thread
MOST_TOGETHER = 32  # parts read at once


@triton.jit
def _read_parts(parts_ptr, lse_ptr, first, start, num_parts, row, columns, W, C: tl.constexpr, TOGETHER: tl.constexpr):
    """Some parts of a row and their log-sum-exps; zeros and minus infinity beyond the last."""
    some = start + tl.arange(0, TOGETHER)
    known = some < num_parts
    places = ((first + some) * 2 + (some == 0).to(tl.int32)).to(tl.int64) * W + row
    inside = known[:, None] & (columns < C)[None, :]
    parts = tl.load(parts_ptr + places[:, None] * C + columns[None, :], mask=inside, other=0.0)
    return parts, tl.load(lse_ptr + places, mask=known, other=float("-inf"))


@triton.jit
def _combine(
    parts_ptr, lse_ptr, out_ptr, shares_ptr, sequences_ptr, num_sequences, num_jobs, W, C: tl.constexpr,
    Z_PADDED: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, BY_SHARE: tl.constexpr,
):  # fmt: skip
    """A program takes one row of one sequence: with one axis less to lay out, no sum crosses threads before the last.

    BY_SHARE: a job is a share, and takes the sequence that begins in it and spans others, which is the share's last.
    """
    row, job = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out_ptrs = out_ptr + row.to(tl.int64) * C + columns
    sequence = job
    if BY_SHARE:
        sequence = tl.load(shares_ptr + job * 4 + 2)
    first = tl.load(sequences_ptr + sequence * 2, mask=sequence >= 0, other=-1)
    num_parts = tl.load(sequences_ptr + sequence * 2 + 1, mask=sequence >= 0, other=0)
    if BY_SHARE:
        num_parts = tl.where(first == job, num_parts, 0)
    if num_parts > 1:
        # The first parts are on their way before the weights are known.
        parts, some_lse = _read_parts(parts_ptr, lse_ptr, first, 0, num_parts, row, columns, W, C, TOGETHER)
        number = tl.arange(0, Z_PADDED)
        slots = ((first + number) * 2 + (number == 0).to(tl.int32)).to(tl.int64)
        lse = tl.load(lse_ptr + slots * W + row, mask=number < num_parts, other=float("-inf"))
        highest = tl.max(lse, axis=0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(lse - highest), axis=0)
        # A part's weight is its exponential sum over the largest; what lies beyond the last part weighs nothing.
        sums = tl.exp2(some_lse - highest)[:, None] * parts
        # What the first reading had no registers for.
        for start in range(TOGETHER, num_parts, TOGETHER):
            parts, some_lse = _read_parts(parts_ptr, lse_ptr, first, start, num_parts, row, columns, W, C, TOGETHER)
            sums += tl.exp2(some_lse - highest)[:, None] * parts
        out = tl.sum(sums, axis=0) / tl.where(total == 0, 1.0, total)
        place = sequence.to(tl.int64) * W * C
        tl.store(out_ptrs + place, to_dtype(out, out_ptr.dtype.element_ty), mask=columns < C)
    # Sequences without a token lie in no share: the jobs take turns.
    empty = job
    while empty < num_sequences:
        if tl.load(sequences_ptr + empty * 2 + 1) == 0:
            place = empty.to(tl.int64) * W * C
            tl.store(out_ptrs + place, tl.zeros((COLUMNS,), out_ptr.dtype.element_ty), mask=columns < C)
        empty += num_jobs


def combine_kernel(parts_2ZWC: Tensor, lse_2ZW: Tensor, out_BSHC: Tensor, schedule: DecodeSchedule) -> None:
    """Fill in `out` for sequences that span shares, and zeros for those without a token."""
    num_slots, num_rows, latent = parts_2ZWC.shape
    num_sequences, num_shares = out_BSHC.shape[0], num_slots // 2
    jobs = min(num_sequences, num_shares)
    # A sequence's parts if all are as long: few parts leave room for more columns, many for more programs.
    together = min(triton.next_power_of_2(triton.cdiv(num_shares, jobs) + 1), MOST_TOGETHER)
    columns = min(ELEMENTS // max(together, 8), triton.next_power_of_2(latent))
    _combine[(num_rows, triton.cdiv(latent, columns), jobs)](
        parts_2ZWC, lse_2ZW, out_BSHC, *schedule, num_sequences, jobs, num_rows, C=latent,
        Z_PADDED=triton.next_power_of_2(num_shares), COLUMNS=columns, TOGETHER=together,
        BY_SHARE=num_sequences > num_shares,
    )  # fmt: skip
