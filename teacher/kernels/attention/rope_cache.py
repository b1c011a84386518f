"""The steps from the projections of MLA to its attention, in two kernels (DeepSeek-V3 s.2.1.1).

`write_latent` norms a token's latent, rotates its rope key and puts both into the paged cache in one go: neither is
written anywhere else. `rotate_queries` turns the rope part of absorbed queries in place. Both leave the rope dimensions
as halves, as `teacher.model.rope.rotate` does.

Shape legend: N tokens, H heads, C latent, R rope, L pages, P positions a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.attention.mla_cache import is_fp8, quantise_entries
from teacher.kernels.device import runs_kernels
from teacher.model.rope import rotate


def write_latent(
    projected_NE: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    interleave: bool,
) -> None:
    """Put tokens into the cache. `projected` is kv_a_proj's output, E = C + R; it may be a slice of a wider tensor.

    The cache is one of `mla_cache`; for one in FP8 `projected` must be BF16. `rotation` is (cos, sin), FP32
    [positions, R/2]; `slots` int64 is page * P + place in the page, -1 for padding,
    which is written nowhere.
    """
    given = projected_NE, norm_weight_C, eps, rotation, positions_N, slots_N, cache_LPE
    if runs_kernels(projected_NE):
        from teacher.kernels.attention.rope_cache_triton import write_latent_kernel

        write_latent_kernel(*given, interleave=interleave)
    else:
        write_latent_twin(*given, interleave=interleave)


def rotate_queries(
    query_NHE: Tensor, rotation: tuple[Tensor, Tensor], positions_N: Tensor, *, latent: int, interleave: bool
) -> None:
    """Rotate the last E - `latent` dimensions in place."""
    if runs_kernels(query_NHE):
        from teacher.kernels.attention.rope_cache_triton import rotate_queries_kernel

        rotate_queries_kernel(query_NHE, rotation, positions_N, latent=latent, interleave=interleave)
    else:
        rotate_queries_twin(query_NHE, rotation, positions_N, latent=latent, interleave=interleave)


def write_latent_twin(
    projected_NE: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    interleave: bool,
) -> None:
    """`write_latent` in plain torch."""
    latent = norm_weight_C.numel()
    numbers = projected_NE.dtype if is_fp8(cache_LPE) else cache_LPE.dtype
    x = projected_NE[:, :latent].float()
    mean_square = ((x * x).double().sum(dim=-1, keepdim=True) / latent).float()
    root = (mean_square + eps).double().sqrt().float()
    normed = x * (1.0 / root) * norm_weight_C.float()
    cos, sin = (table[positions_N] for table in rotation)
    rope = rotate(projected_NE[:, latent:].to(numbers), cos, sin, interleave=interleave)
    new_NE = quantise_entries(normed, rope) if is_fp8(cache_LPE) else torch.cat((normed.to(numbers), rope), dim=-1)
    written = slots_N >= 0
    cache_LPE.flatten(0, 1)[slots_N[written]] = new_NE[written]


def rotate_queries_twin(
    query_NHE: Tensor, rotation: tuple[Tensor, Tensor], positions_N: Tensor, *, latent: int, interleave: bool
) -> None:
    """`rotate_queries` in plain torch: [N, H, E] in place."""
    cos, sin = (table[positions_N].unsqueeze(1) for table in rotation)
    query_NHE[..., latent:] = rotate(query_NHE[..., latent:], cos, sin, interleave=interleave)
