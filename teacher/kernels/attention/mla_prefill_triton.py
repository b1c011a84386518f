"""The Triton side of `mla_prefill`: FlashAttention 2 (arXiv 2307.08691) for keys wider than values.

A key's unrotated and rotated numbers are multiplied apart, as widths of Triton's tiles are powers of two. Blocks of
queries that see most go first, so that the last wave is short.

Shape legend: B sequences, T queries, U keys, H heads, N unrotated and R rotated key numbers, V value numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import dot, to_dtype

LOG2_E = 1.4426950408889634
QUERIES, KEYS = 128, 64
JOINED_ROWS = 16


@triton.jit
def _attend(
    query_N, query_R, sums, total, highest, key_ptr, value_ptr, key_stride, value_stride, places, begin, end, num_keys,
    scale, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, HIDE: tl.constexpr,
):  # fmt: skip
    """Walk keys [begin, end). Only blocks that reach beyond a query's own place HIDE any."""
    columns = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        keys = start + columns
        there = (keys < num_keys)[:, None]
        rows = keys.to(tl.int64)[:, None]
        if HIDE:
            key_N = tl.load(key_ptr + rows * key_stride + tl.arange(0, N)[None, :], mask=there, other=0.0)
            key_R = tl.load(key_ptr + rows * key_stride + N + tl.arange(0, R)[None, :], mask=there, other=0.0)
            value = tl.load(value_ptr + rows * value_stride + tl.arange(0, V)[None, :], mask=there, other=0.0)
        else:
            key_N = tl.load(key_ptr + rows * key_stride + tl.arange(0, N)[None, :])
            key_R = tl.load(key_ptr + rows * key_stride + N + tl.arange(0, R)[None, :])
            value = tl.load(value_ptr + rows * value_stride + tl.arange(0, V)[None, :])
        logits = (dot(query_N, tl.trans(key_N)) + dot(query_R, tl.trans(key_R))) * scale
        if HIDE:
            logits = tl.where(keys[None, :] <= places[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + dot(to_dtype(weights, value.dtype), value)
        highest = higher
    return sums, total, highest


@triton.jit
def _prefill(
    query_ptr, key_ptr, value_ptr, out_ptr, scale, num_queries, num_keys, num_heads,
    query_stride_B, query_stride_T, query_stride_H, key_stride_B, key_stride_U, key_stride_H,
    value_stride_B, value_stride_U, value_stride_H,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Programs start in order: the last block of queries, which sees most keys, goes first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * QUERIES
    rows = first + tl.arange(0, QUERIES)
    inside = (rows < num_queries)[:, None]
    query_ptr += sequence * query_stride_B + head * query_stride_H + rows.to(tl.int64)[:, None] * query_stride_T
    query_N = tl.load(query_ptr + tl.arange(0, N)[None, :], mask=inside, other=0.0)
    query_R = tl.load(query_ptr + N + tl.arange(0, R)[None, :], mask=inside, other=0.0)
    key_ptr += sequence * key_stride_B + head * key_stride_H
    value_ptr += sequence * value_stride_B + head * value_stride_H
    past = num_keys - num_queries
    places = past + rows
    highest = tl.full((QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, V), tl.float32)
    # 1. Keys that all queries of the block see: no mask.
    all_see = (past + first + 1) // KEYS * KEYS
    sums, total, highest = _attend(
        query_N, query_R, sums, total, highest, key_ptr, value_ptr, key_stride_U, value_stride_U, places, 0, all_see,
        num_keys, scale, N, R, V, KEYS, False,
    )  # fmt: skip
    # 2. Keys around the diagonal, and the ragged end.
    sums, total, highest = _attend(
        query_N, query_R, sums, total, highest, key_ptr, value_ptr, key_stride_U, value_stride_U, places, all_see,
        tl.minimum(past + first + QUERIES, num_keys), num_keys, scale, N, R, V, KEYS, True,
    )  # fmt: skip
    out_rows = (sequence * num_queries + rows)[:, None] * num_heads + head
    out = to_dtype(sums / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows * V + tl.arange(0, V)[None, :], out, mask=inside)


@triton.jit
def _join(
    first_ptr, first_lse_ptr, second_ptr, second_lse_ptr, out_ptr, num_rows, num_queries, num_heads,
    first_stride_B, first_stride_T, first_stride_H, second_stride_B, second_stride_T, second_stride_H,
    V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    head, query, sequence = rows % num_heads, rows // num_heads % num_queries, rows // num_heads // num_queries
    lse_places = (sequence * num_heads + head) * num_queries + query
    first_lse = tl.load(first_lse_ptr + lse_places, mask=inside, other=0.0)
    second_lse = tl.load(second_lse_ptr + lse_places, mask=inside, other=0.0)
    # The share of the first set in both exponential sums.
    weight = 1.0 / (1.0 + tl.exp(second_lse - first_lse))
    columns, there = tl.arange(0, V)[None, :], inside[:, None]
    places = (sequence * first_stride_B + query * first_stride_T + head * first_stride_H)[:, None] + columns
    first = tl.load(first_ptr + places, mask=there, other=0.0).to(tl.float32)
    places = (sequence * second_stride_B + query * second_stride_T + head * second_stride_H)[:, None] + columns
    second = tl.load(second_ptr + places, mask=there, other=0.0).to(tl.float32)
    out = second + weight[:, None] * (first - second)
    tl.store(out_ptr + rows[:, None] * V + columns, to_dtype(out, out_ptr.dtype.element_ty), mask=there)


def prefill_kernel(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float) -> Tensor:
    """Widths that are no powers of two are cut into the largest one and the rest, which must be one too."""
    num_sequences, num_queries, num_heads, width = query_BTHD.shape
    nope = 1 << (width - 1).bit_length() - 1
    out = query_BTHD.new_empty(num_sequences, num_queries, num_heads, value_BUHV.shape[-1])
    _prefill[(triton.cdiv(num_queries, QUERIES), num_heads, num_sequences)](
        query_BTHD, key_BUHD, value_BUHV, out, scale * LOG2_E, num_queries, key_BUHD.shape[1], num_heads,
        *query_BTHD.stride()[:3], *key_BUHD.stride()[:3], *value_BUHV.stride()[:3],
        N=nope, R=width - nope, V=value_BUHV.shape[-1], QUERIES=QUERIES, KEYS=KEYS, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def join_kernel(first_BTHV: Tensor, first_lse_BHT: Tensor, second_BTHV: Tensor, second_lse_BHT: Tensor) -> Tensor:
    """Attention over both of two sets of keys, from that over each and its natural log-sum-exp."""
    num_sequences, num_queries, num_heads, width = first_BTHV.shape
    out = torch.empty(first_BTHV.shape, dtype=first_BTHV.dtype, device=first_BTHV.device)
    num_rows = num_sequences * num_queries * num_heads
    _join[(triton.cdiv(num_rows, JOINED_ROWS),)](
        first_BTHV, first_lse_BHT.contiguous(), second_BTHV, second_lse_BHT.contiguous(), out, num_rows, num_queries,
        num_heads, *first_BTHV.stride()[:3], *second_BTHV.stride()[:3], V=width, ROWS=JOINED_ROWS,
    )  # fmt: skip
    return out
