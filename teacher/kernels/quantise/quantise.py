"""Quantisation to E4M3 as DeepSeek-V3 does it (arXiv 2412.19437 s.3.3.2): activations in tiles of 1x128 along K.

`x ~= quantised.float() * scale_inv[tile]`, `scale_inv = max|tile| / 448`. Three sources of activations, one rounding:
a tensor as it is, RMSNorm of it (with the residual added on the way), SwiGLU of a gate and up projection. The norm and
the activation work in FP32 and are never rounded to BF16 between.

Scales lie column by column, [M, K/128] with strides (1, M'), M' = M rounded up to four: the layout that
`torch._scaled_mm` and our block GEMM read. `ue8m0` rounds every scale up to a power of two (what Blackwell's tensor
cores take); it costs up to one bit of the mantissa's range.

Weights in blocks of 128x128: `quantise_weight`, the twin of which is `teacher.model.fp8.quantise_blocks`.

Shape legend: M rows (tokens), K columns, I inner width of an MLP, G = K / 128, P and Q blocks of rows and columns.
"""

from __future__ import annotations

from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.quantise.reference import (
    NormOutput,
    Quantised,
    num_groups,
    quantise_twin,
    rms_norm_quantise_twin,
    swiglu_quantise_twin,
)
from teacher.model.fp8 import quantise_blocks


def quantise(x_MK: Tensor, *, ue8m0: bool = False) -> Quantised:
    """Quantise activations. Raises ValueError unless 128 divides K."""
    num_groups(x_MK.shape[1])
    if runs_kernels(x_MK):
        from teacher.kernels.quantise.quantise_triton import quantise_kernel

        return quantise_kernel(x_MK, ue8m0=ue8m0)
    return quantise_twin(x_MK, ue8m0=ue8m0)


def rms_norm_quantise(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    *,
    add_MK: Tensor | None = None,
    keep_normed: bool = False,
    ue8m0: bool = False,
) -> NormOutput:
    """Quantise `rms_norm(x + add) * weight`; the sum is rounded to x's dtype first, as the residual stream keeps it.

    Raises ValueError unless 128 divides K.
    """
    num_groups(x_MK.shape[1])
    options = {"add_MK": add_MK, "keep_normed": keep_normed, "ue8m0": ue8m0}
    if runs_kernels(x_MK):
        from teacher.kernels.quantise.quantise_triton import rms_norm_quantise_kernel

        return rms_norm_quantise_kernel(x_MK, weight_K, eps, **options)
    return rms_norm_quantise_twin(x_MK, weight_K, eps, **options)


def swiglu_quantise(gate_up_M2I: Tensor, *, ue8m0: bool = False) -> Quantised:
    """Quantise `silu(gate) * up`, gate the first half of the columns. Raises ValueError unless 128 divides I."""
    num_groups(gate_up_M2I.shape[1], parts=2)
    if runs_kernels(gate_up_M2I):
        from teacher.kernels.quantise.quantise_triton import swiglu_quantise_kernel

        return swiglu_quantise_kernel(gate_up_M2I, ue8m0=ue8m0)
    return swiglu_quantise_twin(gate_up_M2I, ue8m0=ue8m0)


def quantise_weight(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 [R, C], scale_inv FP32 [P, Q]) in blocks of 128x128, ragged at the edges."""
    if runs_kernels(weight_RC):
        from teacher.kernels.quantise.quantise_triton import quantise_weight_kernel

        return quantise_weight_kernel(weight_RC)
    return quantise_blocks(weight_RC)


# --- twins ------------------------------------------------------------------------------------------------------------


# --- shapes -----------------------------------------------------------------------------------------------------------
