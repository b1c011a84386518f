"""The Triton side of `teacher.kernels.attention.gqa_cache`: a program takes one head of one token.

Shape legend: N tokens, H heads, J key-value heads, D width of a head, E = 2 J D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype
from teacher.kernels.attention.reference import HeadNorms


@triton.jit
def _place_heads(
    qkv_ptr, query_ptr, cache_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr,
    qkv_stride, eps, H: tl.constexpr, J: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    pairs = tl.arange(0, HALF)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row_ptr = qkv_ptr + token * qkv_stride + head * D
    first, second = tl.load(row_ptr + pairs), tl.load(row_ptr + HALF + pairs)
    dtype = query_ptr.dtype.element_ty
    # Values, and then keys, stand at the same distances in the cache as in the product.
    target_ptr = cache_ptr + slot * (2 * J * D) + (head - H) * D
    if head < H:
        target_ptr = query_ptr + (token * H + head) * D
    if head < H + J:
        x, y = first.to(tl.float32), second.to(tl.float32)
        if NORMS:
            norm_ptr = key_norm_ptr
            if head < H:
                norm_ptr = query_norm_ptr
            inverse = tl.math.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / D + eps)
            x = x * inverse * tl.load(norm_ptr + pairs).to(tl.float32)
            y = y * inverse * tl.load(norm_ptr + HALF + pairs).to(tl.float32)
            x, y = to_dtype(x, dtype).to(tl.float32), to_dtype(y, dtype).to(tl.float32)
        position = tl.load(positions_ptr + token).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + pairs)
        sin = tl.load(sin_ptr + position * HALF + pairs)
        first, second = to_dtype(x * cos - y * sin, dtype), to_dtype(y * cos + x * sin, dtype)
    if (head < H) | (slot >= 0):
        tl.store(target_ptr + pairs, first)
        tl.store(target_ptr + HALF + pairs, second)


def place_heads_kernel(
    qkv_NX: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """Launch `teacher.kernels.attention.gqa_cache.place_heads`: queries [N, H, D] in the product's dtype."""
    half = rotation[0].shape[1]
    num_tokens, kv_heads = qkv_NX.shape[0], cache_LPE.shape[2] // (4 * half)
    query_NHD = qkv_NX.new_empty(num_tokens, num_heads, 2 * half)
    query_norm, key_norm, eps = norms or (qkv_NX, qkv_NX, 0.0)  # without norms, pointers that nobody follows
    if num_tokens:
        _place_heads[(num_tokens, num_heads + 2 * kv_heads)](
            qkv_NX, query_NHD, cache_LPE, query_norm, key_norm, *rotation, positions_N, slots_N, qkv_NX.stride(0), eps,
            H=num_heads, J=kv_heads, HALF=half, NORMS=norms is not None, num_warps=1,
        )  # fmt: skip
    return query_NHD
