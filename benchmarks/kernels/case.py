"""A case: one kernel at one shape, with what says whether it is right and what else does the same.

A case is built on its device just before it is measured, and dropped right after: the cases together do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import poisoned

Run = Callable[[Any], Any]


class PeerMissing(Exception):
    """This peer cannot take this case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Another implementation. `prepare` makes its inputs of ours, outside the timing.

    With a `tolerance`, its result is judged as the kernel's is; without, its form is another and goes unjudged.
    """

    run: Run
    prepare: Run | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Work:
    """A case, built. `make` gives the inputs of a seed; `error` takes a result and the inputs that gave it.

    An error of 0 says the same bits. What is timed rotates over `least_sets` inputs or more, if the L2 holds more.
    """

    run: Run
    make: Callable[[int], Any]
    error: Callable[[Any, Any], float]
    tolerance: float
    size_bytes: int  # read and written at least
    flop: int = 0
    product: str | None = None  # the operands' type: "bf16" or "fp8"
    peers: Callable[[], dict[str, Peer | PeerMissing]] = dict  # looked for only when they are measured
    least_sets: int = 2

    def checked(self, inputs: Any) -> float:
        """The error of one run in memory that was filled with NaN."""
        with poisoned():
            got = self.run(inputs)
        return self.error(got, inputs)


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: str
    build: Callable[[torch.device], Work]
    total: str | None = None  # the shape under which a row sums this case and its neighbours of the same total

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, Euclidean; NaN anywhere gives NaN."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def differing_share(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The share of numbers whose bits differ."""
    differing = total = 0
    for mine, yours in zip(got, wanted, strict=True):
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            raise ValueError(f"{mine.dtype} {tuple(mine.shape)} against {yours.dtype} {tuple(yours.shape)}")
        a, b = (x.contiguous().view(torch.uint8).view(x.numel(), -1) if x.numel() else x for x in (mine, yours))
        differing += (a != b).any(dim=1).sum().item()
        total += mine.numel()
    return differing / max(1, total)
