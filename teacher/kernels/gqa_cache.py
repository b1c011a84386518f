"""The step from the QKV product of grouped-query attention to its attention, in one kernel.

Queries and keys are normed a head where the model does (Qwen3), and rotated as halves; keys and values go straight into
the paged cache, whose entry is a token's keys, one head after another, and then its values.

Shape legend: N tokens, H heads, J key-value heads, D width of a head, X = (H + 2 J) D, L pages, P positions a page,
E = 2 J D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.model.rope import rotate


class HeadNorms(NamedTuple):
    query_D: Tensor
    key_D: Tensor
    eps: float


def place_heads(
    qkv_NX: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """Put tokens into the cache; returns their queries, [N, H, D].

    `rotation` is (cos, sin), FP32 [positions, D/2]; `slots` int64 is page * P + place in the page, -1 for padding,
    which is written nowhere. The kernel needs a D that is a power of two; what the twin needs no kernel for, it takes.
    """
    given = qkv_NX, norms, rotation, positions_N, slots_N, cache_LPE
    if runs_kernels(qkv_NX):
        from teacher.kernels.gqa_cache_triton import place_heads_kernel

        return place_heads_kernel(*given, num_heads=num_heads)
    return place_heads_twin(*given, num_heads=num_heads)


def place_heads_twin(
    qkv_NX: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """`place_heads` in plain torch, for heads of any even width: queries [N, H, D]."""
    width = 2 * rotation[0].shape[1]
    values_from = num_heads * width + cache_LPE.shape[2] // 2
    query = qkv_NX[:, : num_heads * width].unflatten(1, (num_heads, width))
    keys = qkv_NX[:, num_heads * width : values_from].unflatten(1, (-1, width))
    if norms is not None:
        query = F.rms_norm(query, (width,), norms.query_D, norms.eps)
        keys = F.rms_norm(keys, (width,), norms.key_D, norms.eps)
    cos, sin = (table[positions_N].unsqueeze(1) for table in rotation)
    keys = rotate(keys, cos, sin, interleave=False).flatten(1)
    entries_NE = torch.cat((keys, qkv_NX[:, values_from:]), dim=1)
    written = slots_N >= 0
    cache_LPE.flatten(0, 1)[slots_N[written]] = entries_NE[written]
    return rotate(query, cos, sin, interleave=False)
