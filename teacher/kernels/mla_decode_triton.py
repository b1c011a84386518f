"""The Triton side of `teacher.kernels.mla_decode`: online softmax over pages (FlashAttention, arXiv 2205.14135; split
over the context as in Flash-Decoding).

A program holds one block of rows (queries times heads) and walks one part of the pages; each page's latent is read
once, as keys and as values. Blocks of 64 heads: smaller ones would read the cache again for each.

Shape legend: B sequences, S queries each, H heads, W = S * H rows, C latent, R rope, P positions a page, Z parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import INTERPRETED, to_dtype
from teacher.kernels.mla_decode import PAGE, DecodePlan

P = tl.constexpr(PAGE)
LOG2_E = 1.4426950408889634
COLUMNS = 128


@triton.jit
def _dot(a, b):
    """The interpreter's product of BF16 numbers is wrong (3.6, 3.9)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@triton.jit
def _decode(
    query_ptr, cache_ptr, pages_ptr, lengths_ptr, parts_ptr, lse_ptr, scale, pages_stride, pages_a_part, num_parts,
    S: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, sequence, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < S * H
    length = tl.load(lengths_ptr + sequence)
    visible = length - S + 1 + rows // H
    E: tl.constexpr = C + R
    latent, rope, positions = tl.arange(0, C), C + tl.arange(0, R), tl.arange(0, P)
    query_ptr += sequence * S * H * E
    query_C = tl.load(query_ptr + rows[:, None] * E + latent[None, :], mask=inside[:, None], other=0.0)
    query_R = tl.load(query_ptr + rows[:, None] * E + rope[None, :], mask=inside[:, None], other=0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, C), tl.float32)
    begin = part * pages_a_part
    for number in range(begin, min(begin + pages_a_part, (length + P - 1) // P)):
        page = tl.load(pages_ptr + sequence * pages_stride + number).to(tl.int64)
        tokens = number * P + positions
        there = tokens < length
        entries = cache_ptr + page * P * E + positions[:, None] * E
        keys_C = tl.load(entries + latent[None, :], mask=there[:, None], other=0.0)
        keys_R = tl.load(entries + rope[None, :], mask=there[:, None], other=0.0)
        logits = (_dot(query_C, tl.trans(keys_C)) + _dot(query_R, tl.trans(keys_R))) * scale
        logits = tl.where(tokens[None, :] < visible[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        # A row that has seen nothing yet has minus infinity on both sides.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(highest - reference)
        weights = tl.exp2(logits - reference[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + _dot(to_dtype(weights, keys_C.dtype), keys_C)
        highest = higher
    out_rows = (sequence * num_parts + part) * S * H + rows
    # A part beyond what a row sees has a total of zero, and minus infinity as its highest logit and its log-sum-exp.
    divisor = tl.where(total == 0, 1.0, total)
    tl.store(parts_ptr + out_rows[:, None] * C + latent[None, :], sums / divisor[:, None], mask=inside[:, None])
    tl.store(lse_ptr + out_rows, highest + tl.log2(divisor), mask=inside)


@triton.jit
def _join(
    parts_ptr, lse_ptr, out_ptr, num_parts,
    W: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    lse_ptr += sequence * num_parts * W + row
    highest = tl.load(lse_ptr)
    for part in range(1, num_parts):
        highest = tl.maximum(highest, tl.load(lse_ptr + part * W))
    total, sums = 0.0, tl.zeros((COLUMNS,), tl.float32)
    for part in range(num_parts):
        weight = tl.exp2(tl.load(lse_ptr + part * W) - highest)
        total += weight
        places = ((sequence * num_parts + part) * W + row) * C + columns
        sums += weight * tl.load(parts_ptr + places, mask=inside, other=0.0)
    out = to_dtype(sums / total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (sequence * W + row) * C + columns, out, mask=inside)


def mla_decode_kernel(
    query_BSHE: Tensor,
    cache_LPE: Tensor,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    latent: int,
    plan: DecodePlan,
) -> Tensor:
    """Parts are cut by the width of `pages`, not by the lengths: those stay on the device."""
    query = query_BSHE.contiguous()
    num_sequences, num_queries, num_heads, width = query.shape
    num_parts = triton.cdiv(pages_BQ.shape[1], plan.pages_a_part)
    rows = num_queries * num_heads
    parts = torch.empty(num_sequences, num_parts, rows, latent, device=query.device)
    lse = torch.empty(num_sequences, num_parts, rows, device=query.device)
    out = torch.empty(num_sequences, num_queries, num_heads, latent, dtype=query.dtype, device=query.device)
    _decode[(triton.cdiv(rows, plan.heads), num_sequences, num_parts)](
        query, cache_LPE.contiguous(), pages_BQ, lengths_B, parts, lse, scale * LOG2_E, pages_BQ.stride(0),
        plan.pages_a_part, num_parts, S=num_queries, H=num_heads, C=latent, R=width - latent, ROWS=plan.heads,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    _join[(rows, num_sequences, triton.cdiv(latent, COLUMNS))](
        parts, lse, out, num_parts, W=rows, C=latent, COLUMNS=COLUMNS
    )
    return out
