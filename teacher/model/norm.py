"""RMSNorm, computed in FP32 whatever the activations are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the result keeps x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # A view, so that the norm is one use of x: the form for CPUs uses it twice, and whoever computes the norm again
        # in the backward pass would add gradients up in another order.
        return F.rms_norm(x.float().view_as(x), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
