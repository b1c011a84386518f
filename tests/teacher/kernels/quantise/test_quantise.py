"""Quantisation kernels against their twins, bit for bit, and the twins against FP64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from teacher.kernels.exponential import exp_of_minus_abs, sigmoid
from teacher.kernels.quantise import quantise as q
from teacher.model.fp8 import BLOCK, E4M3_MAX, quantise_blocks

# V3's widths where a GPU runs them; small ones for the interpreter, which takes a second for a million numbers.
GPU_SHAPES = [(1, 7_168), (7, 1_536), (64, 18_432), (4_096, 7_168), (4_097, 2_048)]
SMALL_SHAPES = [(1, 128), (3, 640), (8, 512), (33, 896)]


def shapes(device: str) -> list[tuple[int, int]]:
    return GPU_SHAPES + SMALL_SHAPES if device == "cuda" else SMALL_SHAPES


def activations(num_rows: int, num_columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of very different magnitudes, a tile of zeros, a tile with one large number."""
    generator = torch.Generator().manual_seed(num_rows * num_columns)
    x = torch.randn(num_rows, num_columns, generator=generator)
    x *= torch.exp(torch.rand(num_rows, 1, generator=generator) * 30 - 15)
    x[0, :BLOCK] = 0
    x[-1, -1] = 3e4
    return x.to(dtype).to(device)


def poison() -> None:
    """Fill freed memory with NaN, so that what a kernel leaves unwritten shows."""
    if torch.cuda.is_available():
        torch.full((1 << 26,), float("nan"), device="cuda")


def assert_same(got: q.Quantised, wanted: q.Quantised) -> None:
    assert got.values_MK.dtype == torch.float8_e4m3fn
    assert torch.equal(got.values_MK.view(torch.uint8), wanted.values_MK.view(torch.uint8))
    assert torch.equal(got.scale_inv_MG, wanted.scale_inv_MG)
    assert got.scale_inv_MG.stride() == wanted.scale_inv_MG.stride()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_their_twins_bit_for_bit(device: str, dtype: torch.dtype, ue8m0: bool) -> None:
    for num_rows, num_columns in shapes(device):
        x = activations(num_rows, num_columns, dtype, device)
        poison()
        assert_same(q.quantise(x, ue8m0=ue8m0), q.quantise_twin(x, ue8m0=ue8m0))
        gate_up = torch.cat((x, x.flip(0)), dim=1)
        assert_same(q.swiglu_quantise(gate_up, ue8m0=ue8m0), q.swiglu_quantise_twin(gate_up, ue8m0=ue8m0))


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_equals_its_twin_bit_for_bit(device: str, dtype: torch.dtype, added: bool, ue8m0: bool) -> None:
    for num_rows, num_columns in shapes(device):
        x = activations(num_rows, num_columns, dtype, device)
        weight = torch.randn(num_columns, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        options = {"add_MK": x.flip(0) if added else None, "keep_normed": True, "ue8m0": ue8m0}
        poison()
        got, wanted = (norm(x, weight, 1e-6, **options) for norm in (q.rms_norm_quantise, q.rms_norm_quantise_twin))
        assert_same(got.quantised, wanted.quantised)
        assert torch.equal(got.residual_MK, wanted.residual_MK)
        assert torch.equal(got.normed_MK, wanted.normed_MK)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (576, 256)])
def test_weights_equal_the_checkpoint_format_bit_for_bit(device: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:64] *= 1e-30
    weight[:BLOCK, :BLOCK] = 0 if shape[0] > BLOCK else weight[:BLOCK, :BLOCK]
    weight = weight.to(device)
    values, scales = q.quantise_weight(weight)
    wanted_values, wanted_scales = quantise_blocks(weight)
    assert torch.equal(values.view(torch.uint8), wanted_values.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


def test_strided_rows_and_no_rows(device: str) -> None:
    x = activations(12, 512, torch.bfloat16, device)
    assert_same(q.quantise(x[::3, 128:384]), q.quantise_twin(x[::3, 128:384]))
    assert q.quantise(x[:0]).values_MK.shape == (0, 512)


def test_columns_that_128_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128, got 200"):
        q.quantise(torch.ones(2, 200))
    with pytest.raises(ValueError, match="multiple of 256, got 384"):
        q.swiglu_quantise(torch.ones(2, 384))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_the_twin_rounds_within_half_a_step(seed: int, ue8m0: bool) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 3)
    values, scale_inv = q.quantise_twin(x, ue8m0=ue8m0)
    scale = scale_inv.repeat_interleave(BLOCK, dim=1).double()
    error = (values.double() * scale - x.double()).abs()
    # E4M3: three bits of mantissa (half a step is 1/16 of the number at most), subnormal steps of 2^-9 below 2^-6.
    assert (error <= torch.maximum(x.double().abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
    largest = values.float().unflatten(1, (-1, BLOCK)).abs().amax(-1)
    assert (largest > (E4M3_MAX / 2.2 if ue8m0 else E4M3_MAX - 1)).all()
    if ue8m0:
        assert torch.equal(torch.frexp(scale_inv).mantissa, torch.full_like(scale_inv, 0.5))


def test_twins_are_the_functions_they_are_named_after() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 512), torch.randn(512)
    normed = q.rms_norm_quantise_twin(x, weight, 1e-6, add_MK=x, keep_normed=True).normed_MK
    assert normed is not None
    wanted = F.rms_norm(2 * x.double(), (512,), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), wanted, rtol=5e-7, atol=0)  # four roundings to FP32
    values, scales = q.swiglu_quantise_twin(x)
    got = values.double() * scales.double().repeat_interleave(BLOCK, dim=1)
    gate, up = x.double().chunk(2, dim=-1)
    torch.testing.assert_close(got, F.silu(gate) * up, rtol=1 / 15, atol=scales.max().item() * 2.0**-9)


def test_the_exponential_is_as_close_as_it_says() -> None:
    x = torch.cat((torch.linspace(-87, 0, 100_001), -torch.logspace(-30, 1.9, 10_001)))
    error = (exp_of_minus_abs(x).double() / x.double().exp() - 1).abs().max()
    assert error < 2.5e-7
    torch.testing.assert_close(sigmoid(torch.tensor([0.0, 1e30])), torch.tensor([0.5, 1.0]), rtol=0, atol=0)
    assert 0 < sigmoid(torch.tensor([-1e30])).item() < 2e-38
