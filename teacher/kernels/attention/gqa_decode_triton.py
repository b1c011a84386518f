"""The Triton side of `gqa_decode`: online softmax over pages (FlashAttention, arXiv 2205.14135).

A program takes one key-value head of one share of the schedule. Its queries, the group's, are padded to 16 rows, the
least that a tensor core multiplies: the cache is read once a group, and the idle rows cost nothing where memory is the
bound.

Shape legend: B sequences, H heads, J key-value heads, G = H / J, D width of a head, E = 2 J D, P positions a page, Z
shares.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import dot, to_dtype
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_decode_triton import store_share

P = tl.constexpr(PAGE)
LOWEST = tl.constexpr(-1.0e30)  # a maximum over nothing: finite, since minus infinity from itself is NaN


@triton.jit
def _decode(
    query_ptr, cache_ptr, pages_ptr, lengths_ptr, shares_ptr, parts_ptr, lse_ptr, out_ptr, scale, pages_stride,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    kv_head, share = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // J
    own = tl.arange(0, ROWS)
    rows = tl.where(own < G, kv_head * G + own, H)
    shares_ptr += share * 4
    first, last = tl.load(shares_ptr), tl.load(shares_ptr + 2)
    for sequence in range(first, last + 1):
        length = tl.load(lengths_ptr + sequence)
        num_pages = (length + P - 1) // P
        begin = tl.where(sequence == first, tl.load(shares_ptr + 1), 0)
        end = tl.where(sequence == last, tl.load(shares_ptr + 3), num_pages)
        if begin < end:
            sums, total, highest = _attend(
                query_ptr, cache_ptr + kv_head * D, pages_ptr + sequence * pages_stride, sequence, rows, begin, end,
                length, scale, H, J, D, ROWS,
            )  # fmt: skip
            whole = (begin == 0) & (end == num_pages)
            store_share(
                sums, total, highest, rows, sequence, share, begin, whole, parts_ptr, lse_ptr, out_ptr, H, D,
            )  # fmt: skip


@triton.jit
def _attend(
    query_ptr, keys_ptr, pages_ptr, sequence, rows, begin, end, length, scale,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns, positions = tl.arange(0, D), tl.arange(0, P)
    query_ptrs = query_ptr + (sequence * H + rows.to(tl.int64))[:, None] * D + columns[None, :]
    query = tl.load(query_ptrs, mask=(rows < H)[:, None], other=0.0)
    highest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    for number in range(begin, end):
        page = tl.load(pages_ptr + number).to(tl.int64)
        tokens = number * P + positions
        there = (tokens < length)[:, None]
        places = keys_ptr + (page * P + positions)[:, None] * (2 * J * D) + columns[None, :]
        keys = tl.load(places, mask=there, other=0.0)
        values = tl.load(places + J * D, mask=there, other=0.0)
        logits = tl.where((tokens < length)[None, :], dot(query, tl.trans(keys)) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + dot(to_dtype(weights, values.dtype), values)
        highest = higher
    return sums, total, highest


def decode_kernel(
    query_BHD: Tensor,
    cache_LPE: Tensor,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    shares_Z4: Tensor,
    parts_2ZHD: Tensor,
    lse_2ZH: Tensor,
    out_BHD: Tensor,
    *,
    scale_log2: float,
    kv_heads: int,
) -> None:
    """`scale_log2` is the softmax scale times log2 of e: powers are of two."""
    _, num_heads, width = query_BHD.shape
    rows = max(16, triton.next_power_of_2(num_heads // kv_heads))
    stages = 3 if cache_LPE.element_size() == 2 else 2  # pages of FP32 are twice as large in shared memory
    _decode[(kv_heads, shares_Z4.shape[0])](
        query_BHD, cache_LPE, pages_BQ, lengths_B, shares_Z4, parts_2ZHD, lse_2ZH, out_BHD, scale_log2,
        pages_BQ.stride(0), H=num_heads, J=kv_heads, D=width, ROWS=rows, num_warps=4, num_stages=stages,
    )  # fmt: skip
