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
ROUNDER = tl.constexpr(twin.ROUNDER)
C5, C4, C3, C2, C1, C0 = (tl.constexpr(value) for value in twin.COEFFICIENTS)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def exp_of_minus_abs(x):
    """exp(-|x|) of FP32 numbers, as `teacher.kernels.exponential` computes it."""
    y = tl.maximum(-tl.abs(x), LOWEST)
    rounded = y * LOG2_E + ROUNDER
    n = rounded - ROUNDER
    r = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, y))
    p = C5 * r + C4
    p = p * r + C3
    p = p * r + C2
    p = p * r + C1
    p = p * r + C0
    return p * ((rounded.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def widen(x, after=0.0):
    """BF16 to FP32 in one instruction a number, where the compiler takes three for two of them.

    Not before the FP32 number `after` is known: for two uses the compiler would else widen once, and hold twice the
    registers from the first to the second.
    """
    if INTERPRETED or x.dtype != tl.bfloat16:
        out = x.to(tl.float32)
    else:
        out = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r,r,r", [x, after],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return out


@triton.jit
def reciprocal(x):
    """1 / x rounded to nearest, for 2^-126 < |x| < 2^126: Newton's step on the hardware's approximation.

    A general division spends three times the instructions, and a branch for numbers that cannot come here. The tests
    go through all 2^23 numbers from one to two; powers of two change nothing.
    """
    if INTERPRETED:
        inverse = 1.0 / x
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        inverse = tl.fma(tl.fma(-x, inverse, 1.0), inverse, inverse)
    return inverse


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of FP32 numbers."""
    e = exp_of_minus_abs(x)
    inverse = reciprocal(1.0 + e)
    return tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def divide(x, divisor):
    """x / divisor rounded to nearest: one divisor, a scalar, for many numbers whose quotients are moderate.

    One general division, then two steps of Newton's a number: dividing each one took a third longer.
    """
    if INTERPRETED:  # its fused multiply-add rounds twice
        quotient = tl.math.div_rn(x, x * 0.0 + divisor)
    else:
        if divisor < 2.0**-60:  # remainders would be subnormal; scaling both sides up is exact
            x, divisor = x * 2.0**60, divisor * 2.0**60
        inverse = tl.math.div_rn(1.0, divisor)
        quotient = x * inverse
        quotient = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
        quotient = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    return quotient


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


@triton.jit
def dot(a, b, sums=None):
    """sums + a @ b, FP32. The interpreter (3.6, 3.9) multiplies the bits of BF16 numbers: there they become FP32 first.
    FP32 numbers would else be rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
