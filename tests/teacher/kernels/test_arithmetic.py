"""What the kernels compute with, bit for bit what the twins compute with: every number where a GPU runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from teacher.kernels.arithmetic_triton import reciprocal, sigmoid, widen
from teacher.kernels.exponential import sigmoid as sigmoid_twin
from teacher.kernels.quantise.quantise_triton import EXACT, LEAST, scales_of, scales_without_branches
from teacher.model.fp8 import E4M3_MAX

COUNT = 4_096
ONE, TWO = 0x3F800000, 0x40000000  # as bits
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 87.0, -87.0, -87.1, 3.4e38, -3.4e38)


@triton.jit
def _apply(x_ptr, out_ptr, size, SIGMOID: tl.constexpr, COUNT: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + places, mask=places < size, other=1.0)
    out = sigmoid(x) if SIGMOID else reciprocal(x)
    tl.store(out_ptr + places, out, mask=places < size)


def applied(x: torch.Tensor, *, to_sigmoid: bool) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    _apply[(triton.cdiv(x.numel(), COUNT),)](x, out, x.numel(), to_sigmoid, COUNT, **EXACT)
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


@triton.jit
def _scales(largest_ptr, out_ptr, size, COUNT: tl.constexpr):
    """Of both ways, [2 ways, scale_inv and scale, numbers]."""
    places = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = places < size
    largest = tl.load(largest_ptr + places, mask=inside, other=1.0)
    scale_inv, scale = scales_of(largest, False)
    tl.store(out_ptr + places, scale_inv, mask=inside)
    tl.store(out_ptr + size + places, scale, mask=inside)
    scale_inv, scale = scales_without_branches(largest, False)
    tl.store(out_ptr + 2 * size + places, scale_inv, mask=inside)
    tl.store(out_ptr + 3 * size + places, scale, mask=inside)


def test_scales_are_quotients_rounded_to_nearest(device: str) -> None:
    least, most = (torch.tensor(value).view(torch.int32).item() for value in (LEAST.value, 8e37))
    for begin in range(least, most, 1 << 26):
        largest = numbers(begin, min(begin + (1 << 26), most), 1 if device == "cuda" else 500_009, device)
        out = torch.full((2, 2, largest.numel()), float("nan"), device=device)
        _scales[(triton.cdiv(largest.numel(), COUNT),)](largest, out, largest.numel(), COUNT, **EXACT)
        wanted = torch.stack((largest.double() / E4M3_MAX, E4M3_MAX / largest.double())).float()
        assert torch.equal(out, wanted.expand(2, -1, -1))


@triton.jit
def _widened(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places)
    tl.store(out_ptr + places, widen(x))
    tl.store(out_ptr + SIZE + places, widen(x, tl.sum(widen(x), axis=0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 128, 4_096])  # less than a number a thread, one, and many
def test_numbers_are_widened(device: str, dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype).to(device)
    out = torch.full((2, size), float("nan"), device=device)
    _widened[(1,)](x, out, size, **EXACT)
    assert torch.equal(out, x.float().expand(2, -1))
