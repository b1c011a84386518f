"""Attention of many queries: every backend against the twin, the twin against torch, the choice against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.attention.mla_prefill import (
    Backend,
    Widths,
    expansion_flop,
    fastest_backend,
    mla_prefill,
    mla_prefill_twin,
    prefers_absorbed,
)

CASES = [(2, 70, 70, 3, 48, 32), (1, 5, 133, 2, 48, 32), (1, 129, 130, 1, 48, 32)]  # B, T, U, H, D, V
V3_CASES = [(2, 300, 300, 128, 192, 128), (1, 64, 1_000, 128, 192, 128), (1, 513, 2_049, 16, 192, 128)]
# BF16 operands: the softmax's weights are rounded before their product with the values, and so is the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def inputs(case: tuple[int, ...], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    num_sequences, num_queries, num_keys, num_heads, width, value_width = case
    generator = torch.Generator().manual_seed(sum(case))
    query = torch.randn(num_sequences, num_queries, num_heads, width, generator=generator)
    # Keys and values as slices of wider rows, as an up-projection leaves them.
    wide = torch.randn(num_sequences, num_keys, num_heads, width + value_width, generator=generator)
    return [x.to(dtype).to(device) for x in (query, wide[..., :width], wide[..., width:])]


def backends_on(device: str) -> list[Backend | None]:
    return [None, *Backend] if device == "cuda" else [Backend.TRITON]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_equals_the_twin(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores take FP32 as TF32, which the libraries' kernels do not")
    for case in V3_CASES if device == "cuda" else CASES:
        given = inputs(case, dtype, device)
        wanted = mla_prefill_twin(*given, scale=0.1).double()
        for backend in backends_on(device):
            got = mla_prefill(*given, scale=0.1, backend=backend)
            assert got.dtype == dtype
            assert got.shape == wanted.shape
            assert ((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype], (backend, case)


def test_two_sets_of_keys_join_to_attention_over_both(device: str) -> None:
    from teacher.kernels.attention.mla_prefill_triton import join_kernel

    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 21, 3, 32, generator=generator).to(device) for _ in range(3))
    logits = torch.einsum("bthd,buhd->bhtu", query, key)
    parts = []
    for keys in (slice(0, 4), slice(4, 21)):
        out = torch.einsum("bhtu,buhv->bthv", logits[..., keys].softmax(dim=-1), value[:, keys])
        parts += [out, logits[..., keys].logsumexp(dim=-1)]
    wanted = torch.einsum("bhtu,buhv->bthv", logits.softmax(dim=-1), value)
    torch.testing.assert_close(join_kernel(*parts), wanted, rtol=1e-5, atol=1e-5)


def test_the_twin_is_causal_attention() -> None:
    query, key, value = inputs(CASES[0], torch.float32, "cpu")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1).transpose(1, 2)
    torch.testing.assert_close(mla_prefill_twin(query, key, value, scale=0.1), wanted, rtol=1e-5, atol=1e-5)
    # The last queries over all keys are the last rows of attention over whole sequences.
    torch.testing.assert_close(
        mla_prefill_twin(query[:, 50:], key, value, scale=0.1), wanted[:, 50:], rtol=1e-5, atol=1e-5
    )


def test_short_chunks_over_long_contexts_are_absorbed() -> None:
    assert expansion_flop(1) == 33_554_432
    crossover = next(count for count in range(1, 65_536) if not prefers_absorbed(count, 65_536))
    assert 170 <= crossover <= 172  # 171 L / (L + 171), and a little for the pairs that causality hides
    assert not prefers_absorbed(512, 512)  # a whole prompt is expanded
    assert prefers_absorbed(1, 2)
    limits = [next(count for count in range(1, context + 1) if not prefers_absorbed(count, context))
              for context in (64, 256, 1_024, 8_192)]  # fmt: skip
    assert limits == sorted(limits)
    assert limits[0] < 64
    # Heads cost both forms alike.
    assert prefers_absorbed(150, 8_192, Widths(num_heads=16)) == prefers_absorbed(150, 8_192)


def test_a_class_is_timed_once(device: str) -> None:
    if device != "cuda":
        pytest.skip("timing needs a GPU")
    given = inputs(V3_CASES[1], torch.bfloat16, device)
    mla_prefill(*given, scale=0.1)
    before = fastest_backend.cache_info()
    mla_prefill(*(x[:, :60] for x in given[:1]), *given[1:], scale=0.1)
    after = fastest_backend.cache_info()
    assert after.misses == before.misses
    assert after.hits == before.hits + 1


def test_more_queries_than_keys_are_refused() -> None:
    query, key, value = inputs(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="got 70 queries at the end of 69 tokens"):
        mla_prefill(query, key[:, :69], value[:, :69], scale=0.1)
