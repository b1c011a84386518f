"""Which program attends to which pages: a decoding step's work in shares of equal length.

The pages of all sequences are laid on one line, in order, and the line is cut into as many shares as programs run at
once. A sequence may span shares, each of which then leaves a part for `mla_combine` to join; one that lies within a
share is finished by it. The lengths stay on the device, so that a CUDA graph holds for any of them.

Each sequence is preceded on the line by START_PAGES, for what a program does once a sequence besides its pages. Cuts
fall on even pages alone, since the fastest kernel takes two at a time.

Shape legend: B sequences, Z shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.mla_cache import PAGE

START_PAGES = 2  # reading the queries and writing the result take about as long as two pages


class DecodeSchedule(NamedTuple):
    """int32. A share (first sequence, its first page, last sequence, its end); a sequence (first share, shares)."""

    shares_Z4: Tensor
    sequences_B2: Tensor


def schedule_decode(lengths_B: Tensor, num_shares: int) -> DecodeSchedule:
    """Cut sequences of `lengths` tokens (int32, zero allowed) into at most `num_shares` shares.

    A share without work has -1 as its last sequence. One schedule serves all layers of a step.
    Raises ValueError unless there is a share at least.
    """
    if num_shares < 1:
        raise ValueError(f"num_shares must be at least 1, got {num_shares}")
    if runs_kernels(lengths_B):
        from teacher.kernels.mla_schedule_triton import schedule_decode_kernel

        return schedule_decode_kernel(lengths_B, num_shares)
    return schedule_decode_twin(lengths_B, num_shares)


def schedule_decode_twin(lengths_B: Tensor, num_shares: int) -> DecodeSchedule:
    """`schedule_decode` in plain torch; the host reads the lengths."""
    pages_B = (lengths_B.long() + PAGE - 1) // PAGE
    units_B = torch.where(pages_B > 0, (pages_B + 1) // 2 * 2 + START_PAGES, 0)
    ends_B = units_B.cumsum(0)
    starts_B = ends_B - units_B + START_PAGES
    total = int(ends_B[-1])
    share = max(-(-total // (2 * num_shares)) * 2, 2)
    shares = []
    for begin in range(0, num_shares * share, share):
        end = min(begin + share, total)
        if begin >= end:
            shares.append((0, 0, -1, 0))
            continue
        first, last = (int((ends_B <= place).sum()) for place in (begin, end - 1))
        first_page = max(begin - int(starts_B[first]), 0)
        last_page = min(max(end - int(starts_B[last]), 0), int(pages_B[last]))
        shares.append((first, first_page, last, last_page))
    firsts_B = starts_B // share
    num_B = torch.where(pages_B > 0, (ends_B - 1) // share - firsts_B + 1, 0)
    shares_Z4 = torch.tensor(shares, dtype=torch.int32, device=lengths_B.device)
    return DecodeSchedule(shares_Z4, torch.stack((firsts_B, num_B), dim=1).to(torch.int32))
