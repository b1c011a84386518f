"""Types of quantised tensors, and the plain-torch twins of the quantisation kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.exponential import sigmoid
from teacher.model.fp8 import BLOCK, E4M3_MAX

# Below it a tile's largest magnitude counts as this: a tile of zeros must not divide by zero.
LEAST_MAGNITUDE = 1e-4
ROW_ALIGNMENT = 4


class Quantised(NamedTuple):
    """E4M3 [M, K] and FP32 factors [M, G]."""

    values_MK: Tensor
    scale_inv_MG: Tensor


class NormOutput(NamedTuple):
    """`residual_MK` is what was normed, in x's dtype; `normed_MK` the norm in x's dtype, or None if not asked for."""

    quantised: Quantised
    residual_MK: Tensor
    normed_MK: Tensor | None


def quantise_twin(x_MK: Tensor, *, ue8m0: bool = False) -> Quantised:
    """`quantise` in plain torch: E4M3 [M, K] and FP32 [M, G] from any floating type."""
    num_rows, num_columns = x_MK.shape
    tiles = x_MK.float().unflatten(1, (num_columns // BLOCK, BLOCK))
    largest_MG = tiles.abs().amax(dim=-1).clamp_min(LEAST_MAGNITUDE)
    scale_inv_MG, scale_MG = _scales(largest_MG, ue8m0)
    values = (tiles * scale_MG.unsqueeze(-1)).flatten(1).to(torch.float8_e4m3fn)
    columnwise = empty_scales(num_rows, num_columns // BLOCK, x_MK.device)
    return Quantised(values, columnwise.copy_(scale_inv_MG))


def rms_norm_quantise_twin(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    *,
    add_MK: Tensor | None = None,
    keep_normed: bool = False,
    ue8m0: bool = False,
) -> NormOutput:
    """`rms_norm_quantise` in plain torch: sums of squares in FP64, as the kernel has them."""
    residual_MK = x_MK if add_MK is None else (x_MK.float() + add_MK.float()).to(x_MK.dtype)
    x = residual_MK.float()
    # Squares of BF16 numbers summed in FP64: whatever the order of the sum, its FP32 rounding is the same.
    squares = (x * x).double().sum(dim=-1, keepdim=True)
    mean_square = (squares / torch.full_like(squares, x.shape[1])).float()
    # The root in FP64 rounds to the right FP32; torch's own FP32 root on a CPU is at times a bit off.
    root = (mean_square + eps).double().sqrt().float()
    normed = x * (1.0 / root) * weight_K.float()
    return NormOutput(quantise_twin(normed, ue8m0=ue8m0), residual_MK, normed.to(x_MK.dtype) if keep_normed else None)


def swiglu_quantise_twin(gate_up_M2I: Tensor, *, ue8m0: bool = False) -> Quantised:
    """`swiglu_quantise` in plain torch: E4M3 [M, I] from [M, 2I]."""
    gate, up = gate_up_M2I.float().chunk(2, dim=-1)
    return quantise_twin(gate * sigmoid(gate) * up, ue8m0=ue8m0)


def _scales(largest: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """(what multiplies the quantised values, what multiplies the original ones)."""
    # torch divides by a number, on a GPU, and a number by a tensor as it multiplies by a reciprocal: that rounds twice.
    most = torch.full_like(largest, E4M3_MAX)
    if not ue8m0:
        return largest / most, most / largest
    # Up to a power of two: one more in the exponent unless the mantissa is zero.
    bits = (largest / most).view(torch.int32)
    scale_inv = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale_inv, 1.0 / scale_inv


def num_groups(num_columns: int, *, parts: int = 1) -> int:
    """Tiles a row. Raises ValueError where 128 does not divide the columns."""
    if num_columns % (parts * BLOCK):
        raise ValueError(f"the number of columns must be a multiple of {parts * BLOCK}, got {num_columns}")
    return num_columns // (parts * BLOCK)


def empty_scales(num_rows: int, groups: int, device: torch.device) -> Tensor:
    """Uninitialised factors [M, G], column by column."""
    aligned = -(-num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(groups, aligned, dtype=torch.float32, device=device).t()[:num_rows]
