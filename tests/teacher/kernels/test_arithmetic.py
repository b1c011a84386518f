"""What the kernels compute with, bit for bit what the twins compute with: every number where a GPU runs it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from teacher.kernels.arithmetic_triton import reciprocal_from_one_to_two, sigmoid
from teacher.kernels.exponential import sigmoid as sigmoid_twin

COUNT = 4_096
ONE, TWO = 0x3F800000, 0x40000000  # as bits
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 87.0, -87.0, -87.1, 3.4e38, -3.4e38)


@triton.jit
def _apply(x_ptr, out_ptr, size, SIGMOID: tl.constexpr, COUNT: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + places, mask=places < size, other=1.0)
    out = sigmoid(x) if SIGMOID else reciprocal_from_one_to_two(x)
    tl.store(out_ptr + places, out, mask=places < size)


def applied(x: torch.Tensor, *, to_sigmoid: bool) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    _apply[(triton.cdiv(x.numel(), COUNT),)](x, out, x.numel(), to_sigmoid, COUNT, enable_fp_fusion=False)
    return out


def numbers(begin: int, end: int, step: int, device: str) -> torch.Tensor:
    """The FP32 numbers whose bits are begin, begin + step, ..."""
    return torch.arange(begin, end, step, device=device).to(torch.int32).view(torch.float32)


def all_numbers(device: str) -> Iterator[torch.Tensor]:
    step = 1 if device == "cuda" else 70_001
    for begin in range(0, 1 << 32, 1 << 28):
        yield numbers(begin, begin + (1 << 28), step, device)


def test_reciprocals_from_one_to_two_are_rounded_to_nearest(device: str) -> None:
    x = numbers(ONE, TWO + 1, 1 if device == "cuda" else 101, device)
    # FP64 holds twice the digits of FP32 and more: rounding its quotient is rounding the quotient itself.
    assert torch.equal(applied(x, to_sigmoid=False), (1.0 / x.double()).float())


def test_sigmoids_are_the_twins(device: str) -> None:
    for x in (torch.tensor(SPECIAL, device=device), *all_numbers(device)):
        finite = x[x.isfinite()]
        if finite.numel():
            assert torch.equal(applied(finite, to_sigmoid=True), sigmoid_twin(finite))
