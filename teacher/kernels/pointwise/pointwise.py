"""RMSNorm with the residual's sum before it, and SwiGLU, each in one pass over its rows.

In a step of few tokens a kernel costs its launch, whatever it computes: each of these takes the place of two, and
rounds where those two would.

Shape legend: M rows, D hidden, I inner width of an MLP.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.device import runs_kernels


def add_rms_norm(x_MD: Tensor, add_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, rounded to x's dtype, and its RMSNorm, which is computed in FP32 and rounded once."""
    if runs_kernels(x_MD):
        from teacher.kernels.pointwise.pointwise_triton import add_rms_norm_kernel

        return add_rms_norm_kernel(x_MD, add_MD, weight_D, eps)
    return add_rms_norm_twin(x_MD, add_MD, weight_D, eps)


def swiglu(gate_up_M2I: Tensor) -> Tensor:
    """silu(gate) * up, [M, I], gate the first half of the columns; silu is rounded to the dtype before the product."""
    if runs_kernels(gate_up_M2I):
        from teacher.kernels.pointwise.pointwise_triton import swiglu_kernel

        return swiglu_kernel(gate_up_M2I)
    return swiglu_twin(gate_up_M2I)


def add_rms_norm_twin(x_MD: Tensor, add_MD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    sum_MD = x_MD + add_MD
    return sum_MD, F.rms_norm(sum_MD, (sum_MD.shape[-1],), weight_D, eps)


def swiglu_twin(gate_up_M2I: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    gate, up = gate_up_M2I.chunk(2, dim=-1)
    return F.silu(gate) * up
