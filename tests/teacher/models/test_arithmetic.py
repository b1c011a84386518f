"""Products of packed matrices are those of plain ones, up to the order of summation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from teacher.models import arithmetic
from teacher.models.arithmetic import fp32_product, linear, pack, packs

CPU = torch.device("cpu")
# An FP32 sum of K products in another order; BF16 rounds the result to 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 301])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(24, 8), (97, 65), (640, 576)])
def test_a_packed_product_is_the_plain_one(
    dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    has_bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not packs(CPU, dtype):
        pytest.skip("this torch has no oneDNN")
    if has_bf16 and dtype == torch.bfloat16 and not arithmetic._has_bf16_products():
        pytest.skip("this processor has no BF16 products")
    monkeypatch.setattr(arithmetic, "_has_bf16_products", lambda: has_bf16)
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype)
    wide = torch.randn(num_rows, 2 * num_inputs, generator=generator).to(dtype)
    x = wide[:, :num_inputs]  # rows that do not follow each other in memory
    packed = pack(weight)
    for given in (None, bias):
        expected = F.linear(x.double(), weight.double(), None if given is None else given.double())
        result = linear(x, packed, given)
        assert result.dtype == dtype
        assert packed.dtype == (dtype if has_bf16 else torch.float32)
        assert (result - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_logits_of_a_bf16_model_are_in_fp32() -> None:
    weight, x = torch.randn(640, 576).bfloat16(), torch.randn(3, 576).bfloat16()
    expected = F.linear(x.double(), weight.double())
    result = fp32_product(x, pack(weight.float()))
    assert result.dtype == torch.float32
    assert (result - expected).norm() <= TOLERANCES[torch.float32] * expected.norm()


def test_a_gpu_s_matrices_stay_as_they_are() -> None:
    assert not packs(torch.device("cuda"), torch.bfloat16)
