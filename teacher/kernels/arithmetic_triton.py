"""Arithmetic that the kernels share: `teacher.kernels.exponential` operation for operation, and rounded conversions.

Callers compile without fused multiply-add. Triton's interpreter (3.6 and 3.9) truncates FP32 to BF16, and loses the
carry into the exponent on the way to E4M3 (127 becomes 64); there, and only there, a number is rounded before it is
converted.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from teacher.kernels import exponential as twin

LOWEST = tl.constexpr(twin.LOWEST)
LOG2_E = tl.constexpr(twin.LOG2_E)
LN2_HIGH = tl.constexpr(twin.LN2_HIGH)
LN2_LOW = tl.constexpr(twin.LN2_LOW)
C6, C5, C4, C3, C2, C1, C0 = (tl.constexpr(value) for value in twin.COEFFICIENTS)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds FP32 to an integer, ties to even


@triton.jit
def exp_of_minus_abs(x):
    y = tl.maximum(-tl.abs(x), LOWEST)
    n = tl.floor(y * LOG2_E + 0.5)
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    p = C6 * r + C5
    p = p * r + C4
    p = p * r + C3
    p = p * r + C2
    p = p * r + C1
    p = p * r + C0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    e = exp_of_minus_abs(x)
    return tl.math.div_rn(tl.where(x >= 0, 1.0, e), 1.0 + e)


@triton.jit
def to_e4m3(x):
    """FP32 of magnitude at most 448 to the nearest E4M3."""
    if INTERPRETED:
        exponent = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(exponent, 2.0**-6) * 0.125
        rounded = ((tl.abs(x) / step + ROUNDER) - ROUNDER) * step
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        x = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """FP32 to the nearest number of another floating type."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
