"""Random inputs, the same for the same seed on one device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.quantise.reference import Quantised

VALUES_AT_ONCE = 1 << 26


def normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def uniform(device: torch.device, seed: int, *shape: int, low: float, high: float) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device) * (high - low) + low


def e4m3_bits(device: torch.device, seed: int, *shape: int) -> Tensor:
    """E4M3 whose bits are random, NaN left out: gigabytes of weights without as many FP32 numbers on the way."""
    generator = torch.Generator(device).manual_seed(seed)
    bits = torch.empty(shape, dtype=torch.uint8, device=device)
    for part in bits.view(-1).split(VALUES_AT_ONCE):
        part.random_(0, 254, generator=generator)
        part += part >= 0x7F  # 0x7F and 0xFF are NaN: what lies at or above the first moves up by one
    return bits.view(torch.float8_e4m3fn)


class Operands(NamedTuple):
    x: Quantised
    weight_NK: Tensor
    scale_inv_PG: Tensor


class Tokens(NamedTuple):
    x_TD: Tensor
    logits_TE: Tensor
    bias_E: Tensor
