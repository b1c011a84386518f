"""Which program attends to which pages: a decoding step's work in shares of equal length.

The pages of all sequences are laid on one line, in order, and the line is cut into as many shares as programs run at
once. A sequence may span shares, each of which then leaves a part for `mla_combine` to join; one that lies within a
share is finished by it. The lengths stay on the device, so that a CUDA graph holds for any of them.

Each sequence is preceded on the line by START_PAGES, for what a program does once a sequence besides its pages. Cuts
fall on even pages alone, since the fastest kernel takes two at a time.

Shape legend: B sequences, Z shares.
"""

from __future__ import annotations

from torch import Tensor

from teacher.kernels.attention.reference import DecodeSchedule, schedule_decode_twin
from teacher.kernels.device import runs_kernels


def schedule_decode(lengths_B: Tensor, num_shares: int) -> DecodeSchedule:
    """Cut sequences of `lengths` tokens (int32, zero allowed) into at most `num_shares` shares.

    A share without work has -1 as its last sequence. One schedule serves all layers of a step.
    Raises ValueError unless there is a share at least.
    """
    if num_shares < 1:
        raise ValueError(f"num_shares must be at least 1, got {num_shares}")
    if runs_kernels(lengths_B):
        from teacher.kernels.attention.mla_schedule_triton import schedule_decode_kernel

        return schedule_decode_kernel(lengths_B, num_shares)
    return schedule_decode_twin(lengths_B, num_shares)
