"""exp(-|x|) out of multiplications, additions and shifts, so that torch and Triton agree to the last bit.

Libraries differ in the last bit of their exponentials, and a last bit now and then turns an FP8 rounding. Range
reduction after Cody and Waite (x = n ln 2 + r with ln 2 in two parts) and the polynomial of degree 5 whose relative
error on |r| <= ln 2 / 2 is least. Largest relative error 2.5e-7: four in a million of what an E4M3 rounding does.

Both parts of ln 2 have 17 significant bits, so that their products with n are exact: a multiplication and a subtraction
here, one fused multiply-add in the kernels, and the same bits. Adding `ROUNDER` rounds to an integer, and leaves it in
the low bits of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -87.0  # exp of it is still a normal number
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693145751953125
LN2_LOW = 1.428605173714459e-06
ROUNDER = 1.5 * 2.0**23
COEFFICIENTS = (0.008312501013278961, 0.041890330612659454, 0.16667115688323975, 0.499992311000824, 1.0, 1.0)


def exp_of_minus_abs(x: Tensor) -> Tensor:
    """FP32 in, FP32 out; arguments below -87 count as -87."""
    y = (-x.abs()).clamp_min(LOWEST)
    rounded = y * LOG2_E + ROUNDER
    n = rounded - ROUNDER
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = p * r + coefficient
    return p * ((rounded.view(torch.int32) << 23) + (127 << 23)).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), FP32."""
    e = exp_of_minus_abs(x)
    inverse = torch.reciprocal(1 + e)
    return torch.where(x >= 0, inverse, e * inverse)
