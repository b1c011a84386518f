"""Products with a model's matrices, on every device.

On a CPU a matrix is laid out by oneDNN once (`pack`) instead of at every product: MKL, behind `F.linear`, copies an
FP32 matrix into tiles each time, which for a few rows takes far longer than the product (LOG.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that oneDNN is told to expect; its layout then serves any number of them.
_ROWS_HINT = 8


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether matrices of this type are packed there."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight_NK: Tensor) -> Tensor:
    """The matrix in oneDNN's layout: for `linear` and `fp32_product` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), _ROWS_HINT)


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, [M, N], of a matrix that is packed or not."""
    if weight_NK.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_MK.contiguous(), weight_NK, bias_N, "none", [], "")
    return F.linear(x_MK, weight_NK, bias_N)


def fp32_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """[M, N] in FP32, never rounded to the inputs' type. A packed matrix is in FP32 already."""
    if x_MK.is_cuda and x_MK.dtype == torch.bfloat16:
        return torch.mm(x_MK, weight_NK.t(), out_dtype=torch.float32)
    if weight_NK.is_mkldnn:
        return linear(x_MK.float(), weight_NK)
    return F.linear(x_MK.float(), weight_NK.float())
