"""Absorbed decoding over a paged cache: the kernel against its twin, the twin against plain attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.attention.mla_cache import PAGE, quantise_entries
from teacher.kernels.attention.mla_decode import Form, mla_decode, mla_decode_twin, num_shares
from teacher.kernels.attention.mla_schedule import schedule_decode

CASES = [(2, 1, 16, 64, 16), (3, 2, 12, 128, 32), (6, 1, 4, 64, 16)]  # sequences, queries, heads, latent, rope
V3_CASES = [(4, 2, 128, 512, 64), (6, 1, 128, 512, 64), (5, 1, 16, 512, 64), (3, 2, 80, 512, 64)]
LENGTHS = (70, 64, 300, 2, 0, 129)
SHARES = [None, 1, 2, 7]
# BF16 operands: the weights of the softmax are rounded before their product with the values.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def inputs(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    num_sequences, num_queries, num_heads, latent, rope = case
    generator = torch.Generator().manual_seed(sum(case))
    cache = torch.randn(40, PAGE, latent + rope, generator=generator)
    pages = torch.randperm(40, generator=generator)[: num_sequences * 5].view(num_sequences, 5).to(torch.int32)
    query = torch.randn(num_sequences, num_queries, num_heads, latent + rope, generator=generator)
    lengths = torch.tensor(LENGTHS[:num_sequences], dtype=torch.int32)
    # What no sequence has written must not count: it may be anything.
    unwritten = torch.ones(40, PAGE, dtype=torch.bool)
    for owned, length in zip(pages.tolist(), lengths.tolist(), strict=True):
        for place, page in enumerate(owned):
            unwritten[page, : max(min(length - place * PAGE, PAGE), 0)] = False
    cache[unwritten] = float("nan")
    return query.to(dtype).to(device), cache.to(dtype).to(device), pages.to(device), lengths.to(device)


def in_fp8(cache: torch.Tensor, latent: int) -> torch.Tensor:
    """The same cache in FP8, with NaN where it has NaN: 0x7F in E4M3, 0xFFFF in BF16, 0xFFFFFFFF in FP32."""
    numbers = cache.flatten(0, 1).float()
    unwritten = numbers.isnan().any(dim=-1)
    numbers[unwritten] = 1.0
    packed = quantise_entries(numbers[:, :latent], numbers[:, latent:].to(torch.bfloat16))
    packed[unwritten] = 255
    return packed.unflatten(0, cache.shape[:2])


def cases_on(device: str, dtype: torch.dtype) -> list[tuple[int, ...]]:
    return [*CASES, *V3_CASES] if device == "cuda" and dtype == torch.bfloat16 else CASES


def forms_for(case: tuple[int, ...], device: str) -> list[Form]:
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return [*Form] if hopper and case in V3_CASES else [Form.PLAIN]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(device: str, dtype: torch.dtype, shares: int | None) -> None:
    for case in cases_on(device, dtype):
        given = inputs(case, dtype, device)
        wanted = mla_decode_twin(*given, scale=0.1, latent=case[3]).double()
        schedule = schedule_decode(given[3], shares) if shares else None
        for form in forms_for(case, device):
            got = mla_decode(*given, scale=0.1, latent=case[3], schedule=schedule, form=form)
            assert got.dtype == dtype
            assert ((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype], (case, form)


@pytest.mark.parametrize("shares", SHARES)
def test_the_kernel_over_an_fp8_cache_equals_its_twin(device: str, shares: int | None) -> None:
    for case in cases_on(device, torch.bfloat16):
        query, cache, pages, lengths = inputs(case, torch.bfloat16, device)
        given = query, in_fp8(cache, case[3]), pages, lengths
        wanted = mla_decode_twin(*given, scale=0.1, latent=case[3]).double()
        schedule = schedule_decode(lengths, shares) if shares else None
        for form in forms_for(case, device):
            got = mla_decode(*given, scale=0.1, latent=case[3], schedule=schedule, form=form)
            assert got.dtype == torch.bfloat16
            assert ((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[torch.bfloat16], (case, form)


def test_an_fp8_cache_loses_little_of_the_output() -> None:
    query, cache, pages, lengths = inputs(CASES[1], torch.float32, "cpu")
    wanted = mla_decode_twin(query, cache, pages, lengths, scale=0.1, latent=128)
    got = mla_decode_twin(query, in_fp8(cache, 128), pages, lengths, scale=0.1, latent=128)
    # 2.6% of each number of the latent, in the values and through the logits; sharp attention averages nothing out.
    assert ((got - wanted).norm() / wanted.norm()) < 0.06
    assert ((got - wanted).norm() / wanted.norm()) > 1e-3


def test_the_same_step_gives_the_same_bits(device: str) -> None:
    for case in cases_on(device, torch.bfloat16):
        given = inputs(case, torch.bfloat16, device)
        for form in forms_for(case, device):
            first, second = (mla_decode(*given, scale=0.1, latent=case[3], form=form) for _ in range(2))
            assert torch.equal(first, second)


@pytest.mark.parametrize("form", list(Form))
def test_one_graph_serves_any_lengths(device: str, form: Form) -> None:
    if device != "cuda" or form not in forms_for(V3_CASES[1], device):
        pytest.skip("CUDA graphs need a GPU, and the Hopper form its own")
    query, cache, pages, lengths = inputs(V3_CASES[1], torch.bfloat16, device)
    cache.nan_to_num_(nan=1.0)
    static = lengths.clone()
    mla_decode(query, cache, pages, static, scale=0.1, latent=512, form=form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode(query, cache, pages, static, scale=0.1, latent=512, form=form)
    for changed in (lengths, lengths.flip(0), torch.full_like(lengths, 320)):
        static.copy_(changed)
        out.fill_(float("nan"))
        graph.replay()
        wanted = mla_decode_twin(query, cache, pages, changed, scale=0.1, latent=512).double()
        assert ((out.double() - wanted).norm() / wanted.norm()) < TOLERANCE[torch.bfloat16]


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


def test_a_wave_of_shares_fills_the_device() -> None:
    cpu = torch.device("cpu")
    assert num_shares(cpu, 1, 64) == 4
    assert num_shares(cpu, 2, 64) == 2
    assert num_shares(cpu, 2, 4096) == 1


def test_the_hopper_form_is_refused_elsewhere(device: str) -> None:
    given = inputs(CASES[0], torch.bfloat16, device)
    with pytest.raises(ValueError, match="the Hopper form takes BF16 queries and latents of 512"):
        mla_decode(*given, scale=0.1, latent=64, form=Form.HOPPER)


def test_pages_of_another_size_are_refused() -> None:
    query, cache, pages, lengths = inputs(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="pages must hold 64 tokens, got 32"):
        mla_decode(query, cache[:, :32], pages, lengths, scale=1.0, latent=64)
