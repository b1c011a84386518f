"""The paged latent cache: one contiguous entry a token, in BF16 (or FP32) or with the latent in FP8.

An FP8 entry is bytes: C E4M3 numbers, R BF16 numbers, one FP32 scale, 12 bytes of padding up to a multiple of 16.
That is 656 bytes for DeepSeek-V3, against 1,152 in BF16. Rope keys stay in BF16, as in DeepSeek's own FP8 cache.

The scale is a power of two, and one for the whole entry. E4M3 has its own exponent: a number keeps its three bits of
mantissa down to 2^-13 of the largest in its entry, so finer scales would buy nothing that a normed latent needs. And
as powers of two divide exactly, rope keys too are held divided by the scale, an entry is exact in BF16 once read, and a
kernel multiplies a token's logits and weights by the scale instead of its 512 numbers. Rounding moves each number of
the latent by 2^-4 of it at most, 2.6% in the mean square; the same share of the attention output is lost, less what
averages out over the tokens attended to.

Shape legend: N tokens, L pages, P positions a page, E an entry, C latent, R rope.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64
E4M3_MAX = 448.0
SCALE_BYTES = 16
SMALLEST = 2.0**-60  # an entry of zeros gets this as its largest number, so that its scale is a normal number


class Entries(NamedTuple):
    """Views of a cache. `scale_LP` multiplies both of the others; it is None where they are not scaled."""

    latent_LPC: Tensor
    rope_LPR: Tensor
    scale_LP: Tensor | None


def is_fp8(cache_LPE: Tensor) -> bool:
    """Tell an FP8 cache by its dtype."""
    return cache_LPE.dtype == torch.uint8


def entries(cache_LPE: Tensor, latent: int) -> Entries:
    """The parts of each entry. Raises ValueError if an FP8 cache's latent does not fill multiples of 16 bytes."""
    if not is_fp8(cache_LPE):
        return Entries(cache_LPE[..., :latent], cache_LPE[..., latent:], None)
    if latent % 16 or cache_LPE.shape[-1] % 16:
        raise ValueError(f"an FP8 entry is made of 16 bytes, got a latent of {latent} in {cache_LPE.shape[-1]}")
    scale_at = cache_LPE.shape[-1] - SCALE_BYTES
    return Entries(
        cache_LPE.view(torch.float8_e4m3fn)[..., :latent],
        cache_LPE.view(torch.bfloat16)[..., latent // 2 : scale_at // 2],
        cache_LPE.view(torch.float32)[..., scale_at // 4],
    )


def dequantise(cache_LPE: Tensor, latent: int) -> Tensor:
    """The cache as numbers, [L, P, C + R]: an FP8 one in BF16, exactly; another as it is."""
    parts = entries(cache_LPE, latent)
    if parts.scale_LP is None:
        return cache_LPE
    numbers_LPE = torch.cat((parts.latent_LPC.float(), parts.rope_LPR.float()), dim=-1)
    return (numbers_LPE * parts.scale_LP.unsqueeze(-1)).to(torch.bfloat16)


def quantise_entries(latent_NC: Tensor, rope_NR: Tensor) -> Tensor:
    """FP8 entries, bytes [N, E], of FP32 latents and BF16 rope keys."""
    scale_N1 = scale_of(latent_NC).unsqueeze(-1)
    numbers_NC = (latent_NC / scale_N1).to(torch.float8_e4m3fn)
    padding = torch.zeros(len(scale_N1), SCALE_BYTES - 4, dtype=torch.uint8, device=latent_NC.device)
    parts = numbers_NC, (rope_NR.float() / scale_N1).to(torch.bfloat16), scale_N1
    return torch.cat((*(part.contiguous().view(torch.uint8) for part in parts), padding), dim=-1)


def scale_of(latent_NC: Tensor) -> Tensor:
    """FP32 [N]: the least power of two that brings each FP32 latent within E4M3's largest number."""
    ratio = latent_NC.abs().amax(dim=-1).clamp(min=SMALLEST) / E4M3_MAX
    bits = ratio.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
