"""Products with a model's matrices, on every device.

On a CPU a matrix is laid out by oneDNN once (`pack`) instead of at every product: MKL, behind `F.linear`, copies an
FP32 matrix into tiles each time, which for a few rows takes far longer than the product (LOG.md). Where the processor
has no BF16 products, torch's own take seconds a token: there the matrix is laid out in FP32, for twice the bytes, and
the product rounded to BF16, as a BF16 product is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that oneDNN is told to expect; its layout then serves any number of them.
_ROWS_HINT = 8


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether matrices of this type are packed there."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)


def pack(weight_NK: Tensor) -> Tensor:
    """The matrix in oneDNN's layout: for `linear` and `fp32_product` alone."""
    if weight_NK.dtype == torch.bfloat16 and not _has_bf16_products():
        weight_NK = weight_NK.float()
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), _ROWS_HINT)


def _has_bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, [M, N], of a matrix that is packed or not."""
    if not weight_NK.is_mkldnn:
        return F.linear(x_MK, weight_NK, bias_N)
    if bias_N is not None:
        bias_N = bias_N.to(weight_NK.dtype)
    x = x_MK.to(weight_NK.dtype).contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "").to(x_MK.dtype)


def fp32_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """[M, N] in FP32, never rounded to the inputs' type. A packed matrix is in FP32 already."""
    if x_MK.is_cuda and x_MK.dtype == torch.bfloat16:
        return torch.mm(x_MK, weight_NK.t(), out_dtype=torch.float32)
    if weight_NK.is_mkldnn:
        return linear(x_MK.float(), weight_NK)
    return F.linear(x_MK.float(), weight_NK.float())
