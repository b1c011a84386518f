"""Norm, rotation and the write to the cache: bit for bit the twin, which is the model's own norm and rotation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.kernels.attention import rope_cache as rc
from teacher.kernels.attention.mla_cache import dequantise
from teacher.model.rope import rotate
from tests.teacher.kernels.attention.caches import new_cache

PAGE = 64


def inputs(num_tokens: int, latent: int, rope: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + latent)
    angles = torch.rand(200, rope // 2, generator=generator) * 6
    wide = torch.randn(num_tokens, 48 + latent + rope, generator=generator).to(dtype).to(device)
    slots = torch.randperm(5 * PAGE, generator=generator)[:num_tokens]
    slots[num_tokens // 2] = -1
    return {
        "projected": wide[:, 48:],  # a slice: the fused projection's queries come first
        "weight": torch.randn(latent, generator=generator).to(dtype).to(device),
        "cos": angles.cos().to(device),
        "sin": angles.sin().to(device),
        "positions": torch.randint(0, 200, (num_tokens,), generator=generator).to(device),
        "slots": slots.to(device),
        "cache": torch.full((5, PAGE, latent + rope), 7.0, dtype=dtype, device=device),
    }


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_equals_its_twin_bit_for_bit(device: str, dtype: torch.dtype, interleave: bool) -> None:
    for num_tokens, latent, rope in ((1, 512, 64), (9, 96, 16)):
        given = inputs(num_tokens, latent, rope, dtype, device)
        cache = given.pop("cache")
        rotation = given.pop("cos"), given.pop("sin")
        caches = []
        for write in (rc.write_latent, rc.write_latent_twin):
            own = cache.clone()
            write(
                given["projected"], given["weight"], 1e-6, rotation, given["positions"], given["slots"], own,
                interleave=interleave,
            )  # fmt: skip
            caches.append(own)
        assert torch.equal(caches[0], caches[1])
        untouched = (caches[0].flatten(0, 1) == 7.0).all(dim=1).sum()
        assert untouched == 5 * PAGE - (given["slots"] >= 0).sum()


@pytest.mark.parametrize("interleave", [False, True])
def test_writing_in_fp8_equals_its_twin_bit_for_bit(device: str, interleave: bool) -> None:
    for num_tokens, latent, rope in ((1, 512, 64), (9, 96, 16)):
        given = inputs(num_tokens, latent, rope, torch.bfloat16, device)
        given["projected"][num_tokens // 2 - 1, :latent] = 0  # a latent of zeros must not divide by zero
        if num_tokens > 1:
            given["projected"][0, 3] = 3e4  # one number far above the others
        empty = new_cache(5, latent, rope, torch.float8_e4m3fn, device).fill_(7)
        caches = []
        for write in (rc.write_latent, rc.write_latent_twin):
            own = empty.clone()
            own[..., -12:] = 0
            write(
                given["projected"], given["weight"], 1e-6, (given["cos"], given["sin"]), given["positions"],
                given["slots"], own, interleave=interleave,
            )  # fmt: skip
            caches.append(own)
        assert torch.equal(caches[0], caches[1])
        untouched = (caches[0][..., :-12].flatten(0, 1) == 7).all(dim=1).sum()
        assert untouched == 5 * PAGE - (given["slots"] >= 0).sum()


def test_an_fp8_entry_holds_what_was_written_to_within_its_rounding() -> None:
    given = inputs(9, 96, 16, torch.bfloat16, "cpu")
    caches = [new_cache(5, 96, 16, dtype, "cpu") for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    for cache in caches:
        rc.write_latent_twin(
            given["projected"], given["weight"], 1e-6, (given["cos"], given["sin"]), given["positions"],
            given["slots"], cache, interleave=True,
        )  # fmt: skip
    wanted, got = (dequantise(cache, 96).float() for cache in caches)
    assert torch.equal(got[..., 96:], wanted[..., 96:])
    largest = wanted[..., :96].abs().amax(dim=-1, keepdim=True)
    # Half a unit in the last of three bits, on top of BF16's own; below E4M3's range half of 2^-9 of the scale.
    assert ((got - wanted)[..., :96].abs() <= wanted[..., :96].abs() * (2**-4 + 2**-8) + largest * 2**-16).all()


@pytest.mark.parametrize("interleave", [False, True])
def test_what_is_written_is_the_models_norm_and_rotation(interleave: bool) -> None:
    given = inputs(9, 96, 16, torch.float32, "cpu")
    cache, slots = given["cache"], given["slots"]
    rotation = given["cos"], given["sin"]
    rc.write_latent_twin(
        given["projected"], given["weight"], 1e-6, rotation, given["positions"], slots, cache, interleave=interleave
    )
    latent, rope = given["projected"].split((96, 16), dim=-1)
    cos, sin = (table[given["positions"]] for table in rotation)
    wanted = torch.cat(
        (F.rms_norm(latent, (96,), given["weight"], 1e-6), rotate(rope, cos, sin, interleave=interleave)), dim=-1
    )
    torch.testing.assert_close(cache.flatten(0, 1)[slots[slots >= 0]], wanted[slots >= 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_turn_in_place_bit_for_bit(device: str, dtype: torch.dtype, interleave: bool) -> None:
    for num_tokens, num_heads, latent, rope in ((3, 128, 512, 64), (5, 6, 32, 16)):
        given = inputs(num_tokens, latent, rope, dtype, device)
        rotation = given["cos"], given["sin"]
        generator = torch.Generator().manual_seed(1)
        query = torch.randn(num_tokens, num_heads, latent + rope, generator=generator).to(dtype).to(device)
        turned = query.clone()
        rc.rotate_queries(turned, rotation, given["positions"], latent=latent, interleave=interleave)
        wanted = query.clone()
        rc.rotate_queries_twin(wanted, rotation, given["positions"], latent=latent, interleave=interleave)
        assert torch.equal(turned, wanted)
        assert torch.equal(turned[..., :latent], query[..., :latent])
        assert not torch.equal(turned[..., latent:], query[..., latent:])
