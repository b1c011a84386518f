"""Grouped-query decoding over paged keys and values, and what puts them there: the kernels against their twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.attention.gqa_cache import place_heads
from teacher.kernels.attention.gqa_decode import gqa_decode, gqa_decode_twin
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import HeadNorms, place_heads_twin

CASES = [
    (2, 4, 2, 16),
    (3, 6, 1, 32),
    (6, 14, 2, 64),
    (1, 3, 3, 16),
    (2, 40, 2, 16),
]  # sequences, heads, kv heads, width
# Qwen2.5-1.5B, Qwen2.5-7B, Llama-3-8B.
GPU_CASES = [(6, 12, 2, 128), (6, 28, 4, 128), (6, 32, 8, 128)]
LENGTHS = (70, 64, 300, 1, 0, 129)
# FP32 sums in another order; BF16: the weights of the softmax are rounded before their product with the values.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def cases_on(device: str) -> list[tuple[int, ...]]:
    return [*CASES, *GPU_CASES] if device == "cuda" else CASES


def inputs(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    num_sequences, num_heads, kv_heads, width = case
    generator = torch.Generator().manual_seed(sum(case))
    cache = torch.randn(40, PAGE, 2 * kv_heads * width, generator=generator)
    pages = torch.randperm(40, generator=generator)[: num_sequences * 5].view(num_sequences, 5).to(torch.int32)
    query = torch.randn(num_sequences, num_heads, width, generator=generator)
    lengths = torch.tensor(LENGTHS[:num_sequences], dtype=torch.int32)
    # What no sequence has written must not count: it may be anything.
    unwritten = torch.ones(40, PAGE, dtype=torch.bool)
    for owned, length in zip(pages.tolist(), lengths.tolist(), strict=True):
        for place, page in enumerate(owned):
            unwritten[page, : max(min(length - place * PAGE, PAGE), 0)] = False
    cache[unwritten] = float("nan")
    return query.to(dtype).to(device), cache.to(dtype).to(device), pages.to(device), lengths.to(device)


@pytest.mark.parametrize("shares", [None, 1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(device: str, dtype: torch.dtype, shares: int | None) -> None:
    for case in cases_on(device):
        given = inputs(case, dtype, device)
        kind = {"scale": case[3] ** -0.5, "kv_heads": case[2]}
        wanted = gqa_decode_twin(*given, **kind).double()
        got = gqa_decode(*given, **kind, schedule=schedule_decode(given[3], shares) if shares else None)
        assert got.dtype == dtype
        assert ((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype], case


def test_the_twin_is_attention(device: str) -> None:
    query, cache, pages, lengths = inputs(CASES[2], torch.float32, device)
    out = gqa_decode_twin(query, cache, pages, lengths, scale=0.2, kv_heads=2)
    for row, length in enumerate(lengths.tolist()):
        if not length:
            assert not out[row].any()
            continue
        keys, values = cache[pages[row].long()].flatten(0, 1)[:length].unflatten(1, (2, 2, 64)).permute(1, 2, 0, 3)
        wanted = F.scaled_dot_product_attention(
            query[row][None, :, None], keys[None], values[None], scale=0.2, enable_gqa=True
        )
        torch.testing.assert_close(out[row], wanted[0, :, 0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_computed_is_refused(device: str) -> None:
    query, cache, pages, lengths = inputs(CASES[0], torch.float32, device)
    with pytest.raises(ValueError, match="whole groups"):
        gqa_decode(query, cache, pages, lengths, scale=1.0, kv_heads=3)
    with pytest.raises(ValueError, match="from 16 to 128, got 8"):
        gqa_decode(query[..., :8], cache[..., :32], pages, lengths, scale=1.0, kv_heads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_placed_as_by_the_twin(device: str, dtype: torch.dtype, normed: bool) -> None:
    for _, num_heads, kv_heads, width in cases_on(device):
        generator = torch.Generator().manual_seed(width)
        wide = torch.randn(5, (num_heads + 2 * kv_heads) * width + 8, generator=generator).to(dtype).to(device)
        qkv = wide[:, : (num_heads + 2 * kv_heads) * width]
        weights = [torch.rand(width, generator=generator).to(dtype).to(device) for _ in range(2)]
        norms = HeadNorms(*weights, 1e-6) if normed else None
        angles = torch.rand(100, width // 2, generator=generator)
        rotation = angles.cos().to(device), angles.sin().to(device)
        positions = torch.tensor([0, 99, 7, 7, 50], device=device)
        slots = torch.tensor([3, 64, -1, 127, 0], device=device)
        caches = [torch.full((2, PAGE, 2 * kv_heads * width), 7.0, dtype=dtype, device=device) for _ in range(2)]
        given = qkv, norms, rotation, positions, slots
        got = place_heads(*given, caches[0], num_heads=num_heads)
        wanted = place_heads_twin(*given, caches[1], num_heads=num_heads)
        # BF16 rounds twice, after the norm and after the rotation: a last bit of the first, 2^-8, may turn.
        error = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got, wanted, atol=error, rtol=error)
        torch.testing.assert_close(caches[0], caches[1], atol=error, rtol=error)
        assert (caches[0] == 7.0).all(dim=-1).sum() == 2 * PAGE - 4  # padding is written nowhere
