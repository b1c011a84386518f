"""The Triton side of `gqa_prefill`: online softmax over pages (FlashAttention-2, arXiv 2307.08691 s.3.1).

A program takes one head of one block of queries. The heads of a group read the same keys at about the same time, so
the second-level cache holds them.

Shape legend: M rows, H heads, J key-value heads, D width of a head, E = 2 J D, P positions a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import dot, to_dtype
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import QUERY_BLOCK, PackedQueries

P = tl.constexpr(PAGE)
LOWEST = tl.constexpr(-1.0e30)  # a maximum over nothing: finite, since minus infinity from itself is NaN


@triton.jit
def _prefill(
    query_ptr, cache_ptr, spans_ptr, blocks_ptr, pages_ptr, out_ptr, scale, pages_stride,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(blocks_ptr + 2 * block)
    if sequence >= 0:
        first_row = tl.load(blocks_ptr + 2 * block + 1)
        end_row = tl.load(spans_ptr + 3 * sequence + 1)
        length = tl.load(spans_ptr + 3 * sequence + 2)
        rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, D)
        own = (rows < end_row)[:, None]
        places = (rows.to(tl.int64)[:, None] * H + head) * D + columns[None, :]
        query = tl.load(query_ptr + places, mask=own, other=0.0)
        positions = length - end_row + rows  # of the queries in their text
        seen = tl.minimum(length - end_row + first_row + ROWS, length)  # by the last of them, itself among it
        keys_ptr = cache_ptr + (head // (H // J)) * D
        pages_ptr += sequence.to(tl.int64) * pages_stride
        highest = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, D), tl.float32)
        for number in range(0, (seen + P - 1) // P):
            page = tl.load(pages_ptr + number).to(tl.int64)
            tokens = number * P + tl.arange(0, P)
            there = (tokens < seen)[:, None]
            entries = keys_ptr + (page * P + tl.arange(0, P))[:, None] * (2 * J * D) + columns[None, :]
            keys = tl.load(entries, mask=there, other=0.0)
            values = tl.load(entries + J * D, mask=there, other=0.0)
            logits = dot(query, tl.trans(keys)) * scale
            logits = tl.where(tokens[None, :] <= positions[:, None], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, axis=1))
            shrink = tl.exp2(highest - higher)
            weights = tl.exp2(logits - higher[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            sums = sums * shrink[:, None] + dot(to_dtype(weights, values.dtype), values)
            highest = higher
        tl.store(out_ptr + places, to_dtype(sums / total[:, None], out_ptr.dtype.element_ty), mask=own)


def prefill_kernel(
    query_MHD: Tensor, cache_LPE: Tensor, packed: PackedQueries, *, scale_log2: float, kv_heads: int
) -> Tensor:
    """`scale_log2` is the softmax scale times log2 of e: powers are of two."""
    _, num_heads, width = query_MHD.shape
    out_MHD = torch.empty_like(query_MHD)
    stages = 2 if cache_LPE.element_size() == 2 else 1  # pages of FP32 are twice as large in shared memory
    _prefill[(num_heads, len(packed.blocks_N2))](
        query_MHD, cache_LPE, *packed, out_MHD, scale_log2, packed.pages_KQ.stride(0),
        H=num_heads, J=kv_heads, D=width, ROWS=QUERY_BLOCK, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out_MHD
