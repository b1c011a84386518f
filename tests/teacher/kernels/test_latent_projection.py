"""One product for q_a and kv_a: the same numbers as two, in a layout that what follows reads without a copy."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.gemm import block_gemm_twin
from teacher.kernels.latent_projection import fuse_latent_projection, project_latents
from teacher.kernels.quantise import quantise, rms_norm_quantise
from teacher.model.fp8 import quantise_blocks

HIDDEN, QUERY, ENTRY = 256, 384, 160  # 160: as V3's 576, not a multiple of 128


def weights(device: str, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return quantise_blocks(values.to(device))


@pytest.mark.parametrize("num_tokens", [1, 5, 100])
def test_both_parts_equal_the_two_products(device: str, num_tokens: int) -> None:
    x = quantise(torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16().to(device))
    q_a, kv_a = weights(device, QUERY, 0), weights(device, ENTRY, 1)
    parts = project_latents(x, fuse_latent_projection(q_a, kv_a))
    for part, of in zip(parts, (q_a, kv_a), strict=True):
        wanted = block_gemm_twin(x, *of, dtype=torch.float32)
        # Of BF16, as in test_gemm: the kernel may sum in another order, and round where the twin does not.
        assert (part.float() - wanted).norm() < 2.0**-8 * wanted.norm()


def test_the_norm_reads_its_part_in_place(device: str) -> None:
    x = quantise(torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16().to(device))
    latent, entry = project_latents(x, fuse_latent_projection(weights(device, QUERY, 0), weights(device, ENTRY, 1)))
    assert latent.stride() == entry.stride() == (QUERY + ENTRY, 1)
    assert entry.data_ptr() == latent.data_ptr() + QUERY * latent.element_size()
    weight = torch.ones(QUERY, dtype=torch.bfloat16, device=device)
    in_place, copied = (rms_norm_quantise(part, weight, 1e-6).quantised for part in (latent, latent.contiguous()))
    assert torch.equal(in_place.values_MK.view(torch.uint8), copied.values_MK.view(torch.uint8))
    assert torch.equal(in_place.scale_inv_MG, copied.scale_inv_MG)


def test_blocks_that_would_shift_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"multiple of 128 rows.*\(160, 256\)"):
        fuse_latent_projection(weights(device, ENTRY, 0), weights(device, QUERY, 1))
    other = torch.zeros(ENTRY, 128, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="as many columns"):
        fuse_latent_projection(weights(device, QUERY, 0), (other, torch.ones(2, 1, device=device)))
