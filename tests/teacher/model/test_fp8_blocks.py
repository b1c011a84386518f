"""128x128-block FP8: ragged edges, rounding bounds, and agreement with the definition written out."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from teacher.model.fp8 import BLOCK, E4M3_MAX, dequantise_blocks, quantise_blocks, scale_shape

sides = st.one_of(st.integers(1, 300), st.sampled_from([64, 127, 128, 129, 192, 256, 257]))


def random_weight(rows, columns, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp(spread * torch.randn(rows, 1, generator=generator))  # rows of very different size
    return torch.randn(rows, columns, generator=generator) * magnitudes


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(0, 1000), st.floats(0, 3))
def test_round_trip_stays_within_e4m3_rounding(rows, columns, seed, spread):
    weight = random_weight(rows, columns, seed, spread)
    quantised, scale_inv = quantise_blocks(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert tuple(scale_inv.shape) == scale_shape((rows, columns))
    back = dequantise_blocks(quantised, scale_inv)
    for p in range(scale_inv.shape[0]):
        for q in range(scale_inv.shape[1]):
            block = slice(p * BLOCK, (p + 1) * BLOCK), slice(q * BLOCK, (q + 1) * BLOCK)
            # 3 mantissa bits: half a unit in the last place is 1/16 of the value; below 2^-6 the step is 2^-9.
            bound = weight[block].abs() / 16 + scale_inv[p, q] * 2**-10 + 1e-30
            assert ((back[block] - weight[block]).abs() <= bound * 1.001).all()
            assert scale_inv[p, q].item() == pytest.approx(weight[block].abs().max().item() / E4M3_MAX, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(sides, sides, st.integers(0, 1000))
def test_quantising_a_dequantised_weight_changes_nothing(rows, columns, seed):
    quantised, scale_inv = quantise_blocks(random_weight(rows, columns, seed, 1.0))
    again, scale_again = quantise_blocks(dequantise_blocks(quantised, scale_inv))
    assert torch.equal(again.float(), quantised.float())
    torch.testing.assert_close(scale_again, scale_inv, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(576, 256), (130, 300), (1, 1), (128, 128)])
def test_dequantising_equals_the_definition_element_by_element(shape):
    generator = torch.Generator().manual_seed(3)
    quantised = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(scale_shape(shape), generator=generator) + 0.5
    back = dequantise_blocks(quantised, scale_inv)
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    assert torch.equal(back, quantised.float() * scale_inv[rows // 128, columns // 128])


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(140, 140)
    weight[0, 0] = 3.0
    back = dequantise_blocks(*quantise_blocks(weight))
    torch.testing.assert_close(back, weight)


def test_scales_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \(5, 2\)"):
        dequantise_blocks(torch.zeros(576, 256).to(torch.float8_e4m3fn), torch.ones(4, 2))
