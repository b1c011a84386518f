"""The step from the QKV product of grouped-query attention to its attention, in one kernel.

Queries and keys are normed a head where the model does (Qwen3), and rotated as halves; keys and values go straight into
the paged cache, whose entry is a token's keys, one head after another, and then its values.

Shape legend: N tokens, H heads, J key-value heads, D width of a head, X = (H + 2 J) D, L pages, P positions a page,
E = 2 J D.
"""

from __future__ import annotations

from torch import Tensor

from teacher.kernels.attention.reference import HeadNorms, place_heads_twin
from teacher.kernels.device import runs_kernels


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
        from teacher.kernels.attention.gqa_cache_triton import place_heads_kernel

        return place_heads_kernel(*given, num_heads=num_heads)
    return place_heads_twin(*given, num_heads=num_heads)
