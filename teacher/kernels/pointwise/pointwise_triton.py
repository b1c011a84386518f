"""The Triton side of `teacher.kernels.pointwise.pointwise`: a program takes a row, or a part of one.

Shape legend: M rows, D hidden, I inner width of an MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype

_COLUMNS = 1024  # of a program of `_swiglu`


@triton.jit
def _add_rms_norm(
    x_ptr, add_ptr, weight_ptr, sum_ptr, normed_ptr, x_stride, add_stride, eps,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_PADDED)
    inside = columns < D
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(add_ptr + row * add_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = to_dtype(x, dtype)
    tl.store(sum_ptr + row * D + columns, rounded, mask=inside)
    x = rounded.to(tl.float32)
    inverse = tl.math.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * D + columns, to_dtype(x * inverse * weight, dtype), mask=inside)


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, stride, inner, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < inner
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + inner + columns, mask=inside, other=0.0).to(tl.float32)
    activated = to_dtype(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    tl.store(out_ptr + row * inner + columns, to_dtype(activated * up, dtype), mask=inside)


def add_rms_norm_kernel(x_MD: Tensor, add_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch `add_rms_norm`: two tensors [M, D] in x's dtype."""
    num_rows, width = x_MD.shape
    sum_MD, normed_MD = torch.empty(2, num_rows, width, dtype=x_MD.dtype, device=x_MD.device)
    if num_rows:
        padded = triton.next_power_of_2(width)
        _add_rms_norm[(num_rows,)](
            x_MD, add_MD, weight_D, sum_MD, normed_MD, x_MD.stride(0), add_MD.stride(0), eps, D=width, D_PADDED=padded,
            num_warps=min(max(padded // 256, 1), 16),
        )  # fmt: skip
    return sum_MD, normed_MD


def swiglu_kernel(gate_up_M2I: Tensor) -> Tensor:
    """Launch `swiglu`: [M, I]."""
    num_rows, inner = gate_up_M2I.shape[0], gate_up_M2I.shape[1] // 2
    out_MI = gate_up_M2I.new_empty(num_rows, inner)
    if num_rows:
        _swiglu[(num_rows, triton.cdiv(inner, _COLUMNS))](
            gate_up_M2I, out_MI, gate_up_M2I.stride(0), inner, COLUMNS=_COLUMNS, num_warps=4
        )
    return out_MI
