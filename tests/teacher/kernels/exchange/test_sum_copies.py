"""Copies of a token added up in one launch, against the plain sum."""

from __future__ import annotations

import pytest
import torch

from teacher.parallel.exchange.copies import NOWHERE, sum_copies
from teacher.parallel.exchange.sum_copies_triton import sum_copies_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 1), (7, 1_030)])
def test_copies_are_added_in_the_order_of_the_choices(device: str, num_tokens: int, hidden: int, dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(5, hidden, generator=generator).to(dtype)
    places = torch.randint(NOWHERE, 5, (num_tokens, 3), generator=generator)
    if num_tokens:
        places[0] = NOWHERE  # a token without a copy gets zeros
    got = sum_copies_kernel(rows.to(device), places.to(device))
    assert torch.equal(got.cpu(), sum_copies(rows, places))
