"""Caches of latents for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.attention.mla_cache import PAGE, SCALE_BYTES


def entry_width(latent: int, rope: int, *, fp8: bool) -> int:
    """Elements of an entry: numbers, or bytes in FP8."""
    return latent + 2 * rope + SCALE_BYTES if fp8 else latent + rope


def new_cache(num_pages: int, latent: int, rope: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An empty cache [L, P, E]; `dtype` torch.float8_e4m3fn makes it one of bytes (torch.uint8)."""
    fp8 = dtype == torch.float8_e4m3fn
    width = entry_width(latent, rope, fp8=fp8)
    return torch.zeros(num_pages, PAGE, width, dtype=torch.uint8 if fp8 else dtype, device=device)
