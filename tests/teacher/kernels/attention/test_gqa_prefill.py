"""Grouped-query attention of packed prompts: the kernel against its twin, and the twin against torch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from teacher.kernels.attention.gqa_prefill import gqa_prefill
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import QUERY_BLOCK, PackedQueries, gqa_prefill_twin

CASES = [(4, 2, 16), (6, 1, 32), (14, 2, 64), (3, 3, 16)]  # heads, kv heads, width
GPU_CASES = [(12, 2, 128), (9, 3, 64), (32, 8, 128)]  # Qwen2.5-1.5B, SmolLM2-135M, Llama-3-8B
# Rows and length of each: whole prompts, the end of one, one that spans blocks, and padding.
SPANS = [(70, 70), (2, 200), (129, 130), (64, 64), (0, 0), (1, 1)]
PADDING = 13  # rows behind the last sequence's
# FP32 sums in another order; BF16: the weights of the softmax are rounded before their product with the values.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def cases_on(device: str) -> list[tuple[int, int, int]]:
    return [*CASES, *GPU_CASES] if device == "cuda" else CASES


def inputs(
    case: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, PackedQueries]:
    num_heads, kv_heads, width = case
    generator = torch.Generator().manual_seed(sum(case))
    cache = torch.randn(40, PAGE, 2 * kv_heads * width, generator=generator)
    pages = torch.randperm(40, generator=generator)[: len(SPANS) * 4].view(-1, 4)
    written = torch.zeros(40, PAGE, dtype=torch.bool)
    spans, blocks, row = [], [], 0
    for number, (num_rows, length) in enumerate(SPANS):
        spans.append((row, row + num_rows, length))
        blocks += [(number, first) for first in range(row, row + num_rows, QUERY_BLOCK)]
        row += num_rows
        for place in range(length):
            written[pages[number, place // PAGE], place % PAGE] = True
    cache[~written] = float("nan")  # it may be anything
    blocks += [(-1, -1)] * 3
    query = torch.randn(row + PADDING, num_heads, width, generator=generator)
    numbers = (torch.tensor(part, dtype=torch.int32, device=device) for part in (spans, blocks, pages.tolist()))
    return query.to(dtype).to(device), cache.to(dtype).to(device), PackedQueries(*numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(device: str, dtype: torch.dtype) -> None:
    for case in cases_on(device):
        query, cache, packed = inputs(case, dtype, device)
        kind = {"scale": case[2] ** -0.5, "kv_heads": case[1]}
        wanted = gqa_prefill_twin(query, cache, packed, **kind)[:-PADDING].double()
        got = gqa_prefill(query, cache, packed, **kind)
        assert got.dtype == dtype
        assert ((got[:-PADDING].double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype], case


def test_the_twin_is_attention_that_sees_the_past_alone(device: str) -> None:
    query, cache, packed = inputs(CASES[2], torch.float32, device)
    out = gqa_prefill_twin(query, cache, packed, scale=0.2, kv_heads=2)
    for (first, end, length), pages in zip(packed.spans_K3.tolist(), packed.pages_KQ, strict=True):
        if first == end:
            continue
        keys, values = cache[pages.long()].flatten(0, 1)[:length].unflatten(1, (2, 2, 64)).permute(1, 2, 0, 3)
        mask = causal_lower_right(end - first, length)
        wanted = F.scaled_dot_product_attention(
            query[first:end].transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=0.2, enable_gqa=True
        )
        torch.testing.assert_close(out[first:end], wanted[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert not out[-PADDING:].any()


def test_what_cannot_be_computed_is_refused(device: str) -> None:
    query, cache, packed = inputs(CASES[0], torch.float32, device)
    with pytest.raises(ValueError, match="whole groups"):
        gqa_prefill(query, cache, packed, scale=1.0, kv_heads=3)
    with pytest.raises(ValueError, match="from 16 to 128, got 8"):
        gqa_prefill(query[..., :8], cache[..., :32], packed, scale=1.0, kv_heads=2)
