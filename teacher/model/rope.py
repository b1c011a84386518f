"""Rotary positions with YaRN (arXiv 2309.00071), on the decoupled rope dimensions alone.

V3's mscale has two places: cos and sin carry `mscale / mscale_all_dim` (1 for V3 itself), and the softmax scale is
multiplied by `mscale(factor, mscale_all_dim) ** 2`, since nope and rope dimensions share one softmax.

Shape legend: B sequences, T positions, H heads, R rope dimensions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # the kernels import `rotate` on hosts that have torch and Triton alone
    from teacher.model.config import DeepseekV3Config


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN eq. 22 with DeepSeek's weight: 0.1 * mscale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: DeepseekV3Config) -> float:
    """Scale of q.k: 1/sqrt(qk_head_dim), times mscale squared under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(config: DeepseekV3Config) -> Tensor:
    """Angle per position of each rope pair, FP32 [R/2]; YaRN s.3.2 blends interpolation and extrapolation."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0 / powers

    def pair_of(num_rotations: float) -> float:
        # The pair that turns `num_rotations` times within the original context.
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # the ramp becomes a step, not a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return ramp / (yarn.factor * powers) + (1 - ramp) / powers


class RotaryTable(nn.Module):
    """cos and sin for every position up to max_position_embeddings, FP32 [positions, R/2]; not part of checkpoints."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        yarn = config.rope_scaling
        self.scale = 1.0
        if yarn is not None:
            # transformers' reading: without both mscale values the plain YaRN factor applies.
            both = bool(yarn.mscale and yarn.mscale_all_dim)
            numerator = yarn_mscale(yarn.factor, yarn.mscale if both else 1.0)
            self.scale = numerator / yarn_mscale(yarn.factor, yarn.mscale_all_dim if both else 0.0)
        device = torch.get_default_device()
        with torch.device("cpu"):  # the same values everywhere, and real ones under a meta-device context
            angles = torch.outer(
                torch.arange(config.max_position_embeddings, dtype=torch.float32), inverse_frequencies(config)
            )
            cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos if device.type == "meta" else cos.to(device), persistent=False)
        self.register_buffer("sin", sin if device.type == "meta" else sin.to(device), persistent=False)

    def forward(self, num_positions: int, position_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin): [1, T, 1, R/2] for positions 0..T-1, or [B, T, 1, R/2] for given positions."""
        if position_ids_BT is None:
            return self.cos[None, :num_positions, None], self.sin[None, :num_positions, None]
        return self.cos[position_ids_BT].unsqueeze(2), self.sin[position_ids_BT].unsqueeze(2)


def rotate(x_BTHR: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    """Rotate pairs of the last dimension; FP32 inside, x's dtype outside.

    `interleave` takes (x0, x1), (x2, x3), ... as pairs (DeepSeek's layout), else (x0, x[R/2]), ... The result is laid
    out as halves in both cases, as in transformers: q.k does not care, as long as queries and keys agree.
    """
    x = x_BTHR.float()
    if interleave:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHR.dtype)
