"""The plan of a decoding step of paged attention, whichever attention it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from teacher.kernels.attention.reference import DecodeSchedule


@dataclass(frozen=True)
class PagedPlan:
    pages_BQ: Tensor
    lengths_B: Tensor
    schedule: DecodeSchedule | None
