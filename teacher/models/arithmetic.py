"""FP32 products on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fp32_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """[M, N] in FP32, never rounded to the inputs' type."""
    if x_MK.is_cuda and x_MK.dtype == torch.bfloat16:
        return torch.mm(x_MK, weight_NK.t(), out_dtype=torch.float32)
    return F.linear(x_MK.float(), weight_NK.float())
