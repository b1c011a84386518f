"""The portable side of `mla_decode`: online softmax over pages (FlashAttention, arXiv 2205.14135).

A program holds one block of rows (queries times heads) and walks one share of the schedule; each page's latent is read
once, as keys and as values. Blocks of 64 heads: smaller ones would read the cache again for each. An FP8 latent turns
BF16 exactly; its scale, one a token, multiplies logits and weights.

Shape legend: B sequences, S queries each, H heads, W = S * H rows, C latent, R rope, P positions a page, Z shares.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import dot, to_dtype
from teacher.kernels.attention.mla_cache import PAGE, Entries

P = tl.constexpr(PAGE)
LOWEST = tl.constexpr(-1.0e30)  # a maximum over nothing: finite, since minus infinity from itself is NaN


@triton.jit
def _decode(
    query_ptr, latent_ptr, rope_ptr, scale_ptr, pages_ptr, lengths_ptr, shares_ptr, parts_ptr, lse_ptr, out_ptr, scale,
    pages_stride, S, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    ENTRY_C: tl.constexpr, ENTRY_R: tl.constexpr, ENTRY_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    shares_ptr += share * 4
    first, last = tl.load(shares_ptr), tl.load(shares_ptr + 2)
    # The share's sequences: only its first may begin, only its last may end, in their middle.
    for sequence in range(first, last + 1):
        length = tl.load(lengths_ptr + sequence)
        num_pages = (length + P - 1) // P
        begin = tl.where(sequence == first, tl.load(shares_ptr + 1), 0)
        end = tl.where(sequence == last, tl.load(shares_ptr + 3), num_pages)
        # Nothing to do where the share ends before a sequence's first page, or the sequence is empty.
        if begin < end:
            sums, total, highest = _attend(
                query_ptr, latent_ptr, rope_ptr, scale_ptr, pages_ptr + sequence * pages_stride, sequence, rows, begin,
                end, length, scale, S, H, C, R, ROWS, ENTRY_C, ENTRY_R, ENTRY_S,
            )  # fmt: skip
            store_share(
                sums, total, highest, rows, sequence, share, begin, (begin == 0) & (end == num_pages),
                parts_ptr, lse_ptr, out_ptr, S * H, C,
            )  # fmt: skip


@triton.jit
def _attend(
    query_ptr, latent_ptr, rope_ptr, scale_ptr, pages_ptr, sequence, rows, begin, end, length, scale,
    S, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    ENTRY_C: tl.constexpr, ENTRY_R: tl.constexpr, ENTRY_S: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = C + R
    latent, rope, positions = tl.arange(0, C), tl.arange(0, R), tl.arange(0, P)
    inside = rows < S * H
    visible = length - S + 1 + rows // H
    query_ptr += (sequence * S * H + rows.to(tl.int64))[:, None] * E
    query_C = tl.load(query_ptr + latent[None, :], mask=inside[:, None], other=0.0)
    query_R = tl.load(query_ptr + C + rope[None, :], mask=inside[:, None], other=0.0)
    highest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, C), tl.float32)
    for number in range(begin, end):
        page = tl.load(pages_ptr + number).to(tl.int64)
        tokens = number * P + positions
        there = tokens < length
        places = page * P + positions
        keys_C = tl.load(latent_ptr + places[:, None] * ENTRY_C + latent[None, :], mask=there[:, None], other=0.0)
        keys_R = tl.load(rope_ptr + places[:, None] * ENTRY_R + rope[None, :], mask=there[:, None], other=0.0)
        if ENTRY_S:
            token_scale = tl.load(scale_ptr + places * ENTRY_S, mask=there, other=0.0)[None, :]
            keys_C = keys_C.to(query_C.dtype)
            logits = (dot(query_C, tl.trans(keys_C)) + dot(query_R, tl.trans(keys_R))) * token_scale
        else:
            logits = dot(query_C, tl.trans(keys_C)) + dot(query_R, tl.trans(keys_R))
        logits = tl.where(tokens[None, :] < visible[:, None], logits * scale, float("-inf"))
        # Online softmax: what was summed so far is brought to the new maximum.
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if ENTRY_S:
            # The values are the keys, and have their scale.
            weights *= token_scale
        sums = sums * shrink[:, None] + dot(to_dtype(weights, keys_C.dtype), keys_C)
        highest = higher
    return sums, total, highest


@triton.jit
def store_share(
    sums, total, highest, rows, sequence, share, begin, whole, parts_ptr, lse_ptr, out_ptr,
    W, C: tl.constexpr,
):  # fmt: skip
    """Store the result, or a part of it; a part in which a row saw nothing has minus infinity as its log-sum-exp."""
    inside = rows < W
    divisor = tl.where(total == 0, 1.0, total)
    sums = sums / divisor[:, None]
    columns = tl.arange(0, C)[None, :]
    # The share has all of the sequence: no part to join.
    if whole:
        places = (sequence * W + rows.to(tl.int64))[:, None] * C + columns
        tl.store(out_ptr + places, to_dtype(sums, out_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        # A share leaves two parts at most: of the sequence that began before it, and of the one that begins in it.
        slot = share * 2 + (begin == 0).to(tl.int32)
        tl.store(parts_ptr + (slot * W + rows.to(tl.int64))[:, None] * C + columns, sums, mask=inside[:, None])
        lse = tl.where(total == 0, float("-inf"), highest + tl.log2(divisor))
        tl.store(lse_ptr + slot * W + rows, lse, mask=inside)


def decode_kernel(
    query_BSHE: Tensor,
    cache: Entries,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    shares_Z4: Tensor,
    parts_2ZWC: Tensor,
    lse_2ZW: Tensor,
    out_BSHC: Tensor,
    *,
    scale_log2: float,
    rows_a_program: int,
) -> None:
    """`scale_log2` is the softmax scale times log2 of e: powers are of two."""
    _, num_queries, num_heads, width = query_BSHE.shape
    latent = out_BSHC.shape[-1]
    _decode[(triton.cdiv(num_queries * num_heads, rows_a_program), shares_Z4.shape[0])](
        query_BSHE, *cache, pages_BQ, lengths_B, shares_Z4, parts_2ZWC, lse_2ZW, out_BSHC, scale_log2,
        pages_BQ.stride(0), num_queries, H=num_heads, C=latent, R=width - latent, ROWS=rows_a_program,
        ENTRY_C=cache.latent_LPC.stride(1), ENTRY_R=cache.rope_LPR.stride(1),
        ENTRY_S=0 if cache.scale_LP is None else cache.scale_LP.stride(1),
        num_warps=8, num_stages=2,
    )  # fmt: skip
