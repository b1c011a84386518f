"""Rows of bytes: what goes in comes out, rounded as the form says and no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from teacher.kernels.quantise.quantise import quantise
from teacher.model.fp8 import BLOCK
from teacher.parallel.exchange import wire
from teacher.parallel.exchange.wire import Wire


def rows(num_rows: int, hidden: int, per_token: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=generator) * torch.rand(num_rows, 1, generator=generator).exp()
    slots = torch.randint(-1, 2**31 - 1, (num_rows, per_token), generator=generator)
    return x, slots, torch.rand(num_rows, per_token, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.sampled_from([128, 256, 384]), st.integers(0, 8), st.sampled_from(["fp8", "bf16", "fp32"]))
def test_rows_come_out_as_they_went_in(num_rows: int, hidden: int, per_token: int, form: wire.Form) -> None:
    x, slots, weights = rows(num_rows, hidden, per_token, seed=hidden + num_rows)
    parts = wire.layout(hidden, per_token, form)
    packed = wire.pack(x, slots, weights, parts)
    assert packed.shape == (num_rows, parts.row_bytes)
    assert parts.row_bytes % wire.ROW_ALIGNMENT == 0
    got_slots, got_weights = wire.addresses(packed, parts)
    assert torch.equal(got_slots.long(), slots)
    assert torch.equal(got_weights, weights)
    numbers = wire.numbers(packed, parts, torch.float32)
    if form == "fp8":
        values, scale_inv = quantise(x)
        assert torch.equal(numbers, values.float() * scale_inv.repeat_interleave(BLOCK, dim=1))
        assert torch.equal(wire.quantised(packed, parts).values_MK.float(), values.float())
    else:
        assert torch.equal(numbers, x.to(wire.DTYPES[form]).float())
    bare = wire.pack_numbers(x, parts)
    assert torch.equal(bare, packed[:, : parts.scales])
    assert torch.equal(wire.tail(packed, parts), torch.zeros(num_rows, dtype=torch.int32))


def test_a_row_of_v3_is_7472_bytes() -> None:
    """7,168 numbers, 56 scales, eight slots and weights, the tail, padding."""
    assert wire.layout(7168, 8, "fp8").row_bytes == 7168 + 56 * 4 + 8 * 8 + 8 + 8
    assert wire.layout(7168, 8, "bf16").row_bytes == 7168 * 2 + 8 * 8 + 8 + 8


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.sampled_from([4, 8, 12, 16]))
def test_rows_are_gathered_whole(sources: list[int], row_bytes: int) -> None:
    given_rows = torch.arange(7 * row_bytes).remainder(251).to(torch.uint8).view(7, row_bytes)
    assert torch.equal(wire.gather(given_rows, torch.tensor(sources, dtype=torch.int64)), given_rows[sources])


@pytest.mark.parametrize(("out", "back"), [("fp8", "fp8"), ("fp4", "bf16")])
def test_forms_that_do_not_exist_are_refused(out, back) -> None:
    with pytest.raises(ValueError, match="out is one of"):
        Wire(out=out, back=back)


def test_widths_that_a_form_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        wire.layout(100, 2, "fp8")
    with pytest.raises(ValueError, match="whole words"):
        wire.layout(101, 2, "bf16")
