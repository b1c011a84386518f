"""Drawing a token a row from its distribution, cut by top-k, nucleus and min-p; nothing waits for the device.

A uniform number picks by inverse transform in order of falling probability (equal ones by index). Every cut keeps a
beginning of that order: the `top_k` best, of these the smallest set whose share reaches `top_p`, and no token below
`min_p` times the best one's probability; the shortest beginning decides. The kernel finds the boundaries without
sorting; the twin sorts.

Shape legend: N rows, V vocabulary, J of its tokens, likeliest first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels


class Settings(NamedTuple):
    """Columns, FP64 [N, 1]. `uniform` in [0, 1); `top_k` from 1 on, the vocabulary's size where all tokens may come."""

    uniform: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor

    def of(self, rows_N: Tensor) -> Settings:
        """The settings of some rows, int64 [n] or a mask [N]."""
        return Settings(*(column[rows_N] for column in self))


def draw(probabilities_NV: Tensor, settings: Settings) -> Tensor:
    """Tokens, int64 [N], from FP32 probabilities."""
    if runs_kernels(probabilities_NV):
        from teacher.kernels.sampling.sample_triton import draw_kernel

        return draw_kernel(probabilities_NV, torch.cat(settings, dim=1).contiguous())
    return draw_twin(probabilities_NV, settings)


def draw_twin(probabilities_NV: Tensor, settings: Settings) -> Tensor:
    """`draw` in plain torch, which sorts: int64 [N] from FP32 [N, V]."""
    ordered = probabilities_NV.sort(dim=-1, descending=True, stable=True)
    return pick(ordered.values, ordered.indices, settings)


def pick(probabilities_NJ: Tensor, tokens_NJ: Tensor, settings: Settings) -> Tensor:
    """From the likeliest tokens, in falling order; right where no cut lies beyond them."""
    cumulative_NJ = probabilities_NJ.double().cumsum(dim=-1)
    last, top_k = probabilities_NJ.shape[1] - 1, settings.top_k.long()
    # A whole distribution's sum is one, not what rounding makes of it.
    best_k_N1 = torch.where(top_k > last, 1.0, cumulative_NJ.gather(1, (top_k - 1).clamp(max=last)))
    in_nucleus = (cumulative_NJ - probabilities_NJ < settings.top_p * best_k_N1).sum(dim=-1, keepdim=True)
    above = (probabilities_NJ >= settings.min_p * probabilities_NJ[:, :1]).sum(dim=-1, keepdim=True)
    kept_N1 = in_nucleus.minimum(above).minimum(top_k).clamp(min=1)
    mass_N1 = cumulative_NJ.gather(1, kept_N1 - 1)
    picked = torch.searchsorted(cumulative_NJ, settings.uniform * mass_N1, right=True)
    return tokens_NJ.gather(1, picked.minimum(kept_N1 - 1)).squeeze(1)
