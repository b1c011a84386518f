"""Absorbed decoding over a paged cache: the kernel against its twin, the twin against plain attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.mla_decode import PAGE, DecodePlan, mla_decode, mla_decode_twin

CASES = [(2, 1, 16, 64, 16), (3, 2, 12, 128, 32)]  # sequences, queries, heads, latent, rope
V3_CASE = (4, 2, 128, 512, 64)
PLANS = [None, DecodePlan(16, 2), DecodePlan(16, 1)]
LENGTHS = (70, 64, 300, 2)
# BF16 operands: the weights of the softmax are rounded before their product with the values.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def inputs(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    num_sequences, num_queries, num_heads, latent, rope = case
    generator = torch.Generator().manual_seed(sum(case))
    cache = torch.randn(40, PAGE, latent + rope, generator=generator)
    pages = torch.randperm(40, generator=generator)[: num_sequences * 5].view(num_sequences, 5).to(torch.int32)
    query = torch.randn(num_sequences, num_queries, num_heads, latent + rope, generator=generator)
    lengths = torch.tensor(LENGTHS[:num_sequences], dtype=torch.int32)
    # What no sequence owns must not be read: it may be anything.
    owned = set(pages.flatten().tolist())
    cache[[page for page in range(40) if page not in owned]] = float("nan")
    return query.to(dtype).to(device), cache.to(dtype).to(device), pages.to(device), lengths.to(device)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(device: str, dtype: torch.dtype, plan: DecodePlan | None) -> None:
    cases = CASES if device == "cpu" else [*CASES, V3_CASE] if dtype == torch.bfloat16 else CASES
    for case in cases:
        given = inputs(case, dtype, device)
        wanted = mla_decode_twin(*given, scale=0.1, latent=case[3]).double()
        got = mla_decode(*given, scale=0.1, latent=case[3], plan=plan)
        assert got.dtype == dtype
        assert ((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


def test_the_twin_is_attention_that_sees_the_past_alone() -> None:
    for case in CASES:
        query, cache, pages, lengths = inputs(case, torch.float32, "cpu")
        got = mla_decode_twin(query, cache, pages, lengths, scale=0.1, latent=case[3])
        for sequence, length in enumerate(lengths.tolist()):
            entries = torch.cat([cache[page] for page in pages[sequence].tolist()])[:length]
            for place in range(case[1]):
                seen = entries[: length - case[1] + 1 + place]
                wanted = F.scaled_dot_product_attention(
                    query[sequence, place][None], seen[None], seen[None, :, : case[3]], scale=0.1
                )[0]
                torch.testing.assert_close(got[sequence, place], wanted, rtol=1e-4, atol=1e-5)


def test_pages_of_another_size_are_refused() -> None:
    query, cache, pages, lengths = inputs(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="pages must hold 64 tokens, got 32"):
        mla_decode(query, cache[:, :32], pages, lengths, scale=1.0, latent=64)
