"""The Triton side of `teacher.kernels.attention.rope_cache`: a program takes one token.

Shape legend: N tokens, H heads, C latent, R rope.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import to_dtype, to_e4m3
from teacher.kernels.attention import mla_cache
from teacher.kernels.attention.mla_cache import entries

E4M3_MAX = tl.constexpr(mla_cache.E4M3_MAX)
SMALLEST = tl.constexpr(mla_cache.SMALLEST)
EXACT = {"enable_fp_fusion": False}
HEADS_A_PROGRAM = 32


@triton.jit
def _write_latent(
    projected_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, latent_ptr, rope_ptr, scale_ptr,
    projected_stride, eps, C: tl.constexpr, C_PADDED: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr, ENTRY_C: tl.constexpr, ENTRY_R: tl.constexpr, ENTRY_S: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        # New names: a branch cannot turn an argument, a pointer, into a block of pointers.
        row_ptr = projected_ptr + token * projected_stride
        columns = tl.arange(0, C_PADDED)
        inside = columns < C
        x = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        mean_square = (tl.sum((x * x).to(tl.float64), axis=0) / C).to(tl.float32)
        inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + eps))
        normed = x * inverse * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        latent_ptrs = latent_ptr + slot * ENTRY_C + columns
        # An FP8 cache: one scale a token, a power of two, so that dividing the rope keys by it is exact.
        if ENTRY_S:
            largest = tl.maximum(tl.max(tl.abs(normed), axis=0), SMALLEST)
            bits = tl.math.div_rn(largest, E4M3_MAX).to(tl.int32, bitcast=True)
            scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
            tl.store(latent_ptrs, to_e4m3(tl.math.div_rn(normed, scale)), mask=inside)
            tl.store(scale_ptr + slot * ENTRY_S, scale)
        else:
            scale = 1.0
            tl.store(latent_ptrs, to_dtype(normed, latent_ptr.dtype.element_ty), mask=inside)
        pairs = tl.arange(0, HALF)
        position = tl.load(positions_ptr + token).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + pairs)
        sin = tl.load(sin_ptr + position * HALF + pairs)
        rope_ptrs = rope_ptr + slot * ENTRY_R + pairs
        dtype = rope_ptr.dtype.element_ty
        first = tl.load(row_ptr + C + pairs * STEP).to(dtype).to(tl.float32)
        second = tl.load(row_ptr + C + pairs * STEP + APART).to(dtype).to(tl.float32)
        # Rounded before it is divided by a power of two, and exact after.
        turned = to_dtype(first * cos - second * sin, dtype).to(tl.float32)
        tl.store(rope_ptrs, to_dtype(tl.math.div_rn(turned, scale), dtype))
        turned = to_dtype(second * cos + first * sin, dtype).to(tl.float32)
        tl.store(rope_ptrs + HALF, to_dtype(tl.math.div_rn(turned, scale), dtype))


@triton.jit
def _rotate_queries(
    query_ptr, cos_ptr, sin_ptr, positions_ptr, token_stride, head_stride, num_heads,
    C: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None]
    rope_ptr = query_ptr + token * token_stride + heads[:, None] * head_stride + C
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + pairs)[None, :]
    sin = tl.load(sin_ptr + position * HALF + pairs)[None, :]
    first = tl.load(rope_ptr + pairs[None, :] * STEP, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(rope_ptr + pairs[None, :] * STEP + APART, mask=inside, other=0.0).to(tl.float32)
    # All of a head's numbers must have been read before the first is overwritten by another thread.
    tl.debug_barrier()
    turned = first * cos - second * sin
    tl.store(rope_ptr + pairs[None, :], to_dtype(turned, query_ptr.dtype.element_ty), mask=inside)
    turned = second * cos + first * sin
    tl.store(rope_ptr + HALF + pairs[None, :], to_dtype(turned, query_ptr.dtype.element_ty), mask=inside)


def write_latent_kernel(
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
    """Launch `write_latent` for [N, C + R]."""
    latent, half = norm_weight_C.numel(), rotation[0].shape[-1]
    if not projected_NE.shape[0]:
        return
    cache = entries(cache_LPE, latent)
    _write_latent[(projected_NE.shape[0],)](
        projected_NE, norm_weight_C, *rotation, positions_N, slots_N, *cache, projected_NE.stride(0), eps,
        C=latent, C_PADDED=triton.next_power_of_2(latent), HALF=half, ENTRY_C=cache.latent_LPC.stride(1),
        ENTRY_R=cache.rope_LPR.stride(1), ENTRY_S=0 if cache.scale_LP is None else cache.scale_LP.stride(1),
        **_pairing(half, interleave), **EXACT,
    )  # fmt: skip


def rotate_queries_kernel(
    query_NHE: Tensor, rotation: tuple[Tensor, Tensor], positions_N: Tensor, *, latent: int, interleave: bool
) -> None:
    """Launch `rotate_queries` for [N, H, E], in place."""
    num_tokens, num_heads, _ = query_NHE.shape
    half = rotation[0].shape[-1]
    if not num_tokens:
        return
    _rotate_queries[(num_tokens, triton.cdiv(num_heads, HEADS_A_PROGRAM))](
        query_NHE, *rotation, positions_N, query_NHE.stride(0), query_NHE.stride(1), num_heads,
        C=latent, HALF=half, HEADS=HEADS_A_PROGRAM, **_pairing(half, interleave), **EXACT,
    )  # fmt: skip


def _pairing(half: int, interleave: bool) -> dict[str, int]:
    """Places of pair i: (2i, 2i + 1), or (i, i + R/2)."""
    return {"STEP": 2, "APART": 1} if interleave else {"STEP": 1, "APART": half}
