"""RMSNorm behind a sum, and SwiGLU: the kernels against their twins."""

from __future__ import annotations

import pytest
import torch

from teacher.kernels.pointwise.pointwise import add_rms_norm, add_rms_norm_twin, swiglu, swiglu_twin

# FP32: another order of summation, another exponential. BF16: a last bit may turn where a number lies between two.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_behind_a_sum_equals_its_twin(device: str, dtype: torch.dtype) -> None:
    for rows, width in ((3, 576), (1, 1536), (5, 48)):
        generator = torch.Generator().manual_seed(width)
        wide, add = torch.randn(2, rows, 2 * width, generator=generator).to(dtype).to(device)
        weight = torch.randn(width, generator=generator).to(dtype).to(device)
        given = wide[:, :width], 3 * add[:, width:], weight, 1e-6
        (got_sum, got), (wanted_sum, wanted) = add_rms_norm(*given), add_rms_norm_twin(*given)
        assert torch.equal(got_sum, wanted_sum)
        torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_equals_its_twin(device: str, dtype: torch.dtype) -> None:
    for rows, inner in ((3, 1536), (1, 8960), (2, 72)):
        generator = torch.Generator().manual_seed(inner)
        gate_up = (8 * torch.randn(rows, 2 * inner, generator=generator)).to(dtype).to(device)
        torch.testing.assert_close(swiglu(gate_up), swiglu_twin(gate_up), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
