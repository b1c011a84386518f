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
from teacher.kernels.mla_schedule import DecodeSchedule

COLUMNS = 128
ELEMENTS = 4096  # read at once by a program: 32 registers a thread
PROGRAMS = 2048  # of them, most do nothing where few sequences span shares


@triton.jit
def _combine(
    parts_ptr, lse_ptr, out_ptr, shares_ptr, sequences_ptr, W, C: tl.constexpr, Z_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, BY_SHARE: tl.constexpr,
):  # fmt: skip
    if BY_SHARE:
        # A sequence that spans shares is the last one of the share that it begins in.
        sequence = tl.load(shares_ptr + tl.program_id(2) * 4 + 2)
        first = tl.load(sequences_ptr + sequence * 2, mask=sequence >= 0, other=-1)
        num_parts = tl.load(sequences_ptr + sequence * 2 + 1, mask=sequence >= 0, other=1)
        num_parts = tl.where(first == tl.program_id(2), num_parts, 1)
    else:
        sequence = tl.program_id(2)
        first = tl.load(sequences_ptr + sequence * 2)
        num_parts = tl.load(sequences_ptr + sequence * 2 + 1)
    if num_parts != 1:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (rows < W)[:, None] & (columns < C)[None, :]
        number = tl.arange(0, Z_PADDED)
        slots = ((first + number) * 2 + (number == 0).to(tl.int32)).to(tl.int64)
        there = (number < num_parts)[:, None] & (rows < W)[None, :]
        lse = tl.load(lse_ptr + slots[:, None] * W + rows[None, :], mask=there, other=float("-inf"))
        highest = tl.max(lse, axis=0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(lse - highest[None, :]), axis=0)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, num_parts, TOGETHER):
            some = start + tl.arange(0, TOGETHER)
            some_slots = ((first + some) * 2 + (some == 0).to(tl.int32)).to(tl.int64)
            known = (some < num_parts)[:, None] & (rows < W)[None, :]
            some_lse = tl.load(lse_ptr + some_slots[:, None] * W + rows[None, :], mask=known, other=float("-inf"))
            weights = tl.exp2(some_lse - highest[None, :])
            places = (some_slots[:, None, None] * W + rows[None, :, None]) * C + columns[None, None, :]
            parts = tl.load(parts_ptr + places, mask=known[:, :, None] & inside[None, :, :], other=0.0)
            sums += tl.sum(weights[:, :, None] * parts, axis=0)
        out = sums / tl.where(total == 0, 1.0, total)[:, None]
        places = (sequence.to(tl.int64) * W + rows)[:, None] * C + columns[None, :]
        tl.store(out_ptr + places, to_dtype(out, out_ptr.dtype.element_ty), mask=inside)


def combine_kernel(parts_2ZWC: Tensor, lse_2ZW: Tensor, out_BSHC: Tensor, schedule: DecodeSchedule) -> None:
    """Fill in `out` for sequences that span shares, and zeros for those without a token."""
    num_slots, num_rows, latent = parts_2ZWC.shape
    num_sequences, num_shares = out_BSHC.shape[0], num_slots // 2
    column_blocks = triton.cdiv(latent, COLUMNS)
    by_share = num_sequences > num_shares
    jobs = min(num_sequences, num_shares)
    rows = triton.next_power_of_2(max(jobs * num_rows * column_blocks // PROGRAMS, 1))
    rows = min(rows, 16, triton.next_power_of_2(num_rows))
    _combine[(triton.cdiv(num_rows, rows), column_blocks, jobs)](
        parts_2ZWC, lse_2ZW, out_BSHC, *schedule, num_rows, C=latent, Z_PADDED=triton.next_power_of_2(num_shares),
        ROWS=rows, COLUMNS=COLUMNS, TOGETHER=ELEMENTS // (COLUMNS * rows), BY_SHARE=by_share,
    )  # fmt: skip
