"""Rows stored straight into peers' memory, by ranks in one process: bytes, places and sums as over an exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from teacher.parallel import wire
from teacher.parallel.dispatch import Exchange
from teacher.parallel.groups import Ranks
from teacher.parallel.low_latency import Arrived, LowLatency
from teacher.parallel.placement import Placement
from teacher.parallel.symmetric import SymmetricLowLatency
from teacher.parallel.wire import Wire
from tests.teacher.kernels.shared_inboxes import Shared


def ran(form: type[LowLatency], case: dict[str, Any]) -> tuple[list[Arrived], list[torch.Tensor], list[bool]]:
    """Dispatch, experts that scale their tokens, combine: twice, on every rank."""
    placement, wire_of, device = case["placement"], case["wire"], case["device"]
    shared = Shared(placement.num_ranks, device)
    forms = []
    for rank in range(placement.num_ranks):
        ranks = Ranks(rank, placement.num_ranks, placement.num_ranks, torch.device(device), None, None, None)
        sizes = {
            "hidden": case["hidden"],
            "per_token": case["per_token"],
            "max_tokens": case.get("max_tokens", 6),
            "capacity": case["capacity"],
        }
        forms.append(form(Exchange(ranks, placement, wire=wire_of), make_mailbox=shared, **sizes))
    for tokens in (case["first"], case["tokens"]):
        sent = [form.send(*of_rank) for form, of_rank in zip(forms, tokens, strict=True)]
        arrived = [form.received(places) for form, places in zip(forms, sent, strict=True)]
        for rank, (form, of_rank) in enumerate(zip(forms, arrived, strict=True)):
            share = torch.where(of_rank.slots_MK >= 0, of_rank.weights_MK * (of_rank.slots_MK + rank), 0.0).sum(dim=1)
            form.send_back(of_rank.x(torch.float32) * share.unsqueeze(1), of_rank)
        arrived = [of_rank._replace(rows_QB=of_rank.rows_QB.clone()) for of_rank in arrived]
        sums = [form.summed(places) for form, places in zip(forms, sent, strict=True)]
    return arrived, sums, [form.take_overflow() for form in forms]


def tokens(sizes: list[int], case: dict[str, Any], seed: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        x = torch.randn(size, case["hidden"], generator=generator).to(torch.bfloat16)
        scores = torch.rand(size, case["placement"].num_experts, generator=generator)
        weights, indices = scores.topk(case["per_token"], dim=1)
        made.append(tuple(part.to(case["device"]) for part in (x, indices, weights)))
    return made


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))  # interpreted, shrinking takes long
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["fp8", "bf16"]),
    st.sampled_from([128, 384]),
    st.booleans(),
    st.data(),
)
def test_stores_to_peers_equal_the_exchange(
    device, num_ranks, capacity, per_token, out, hidden, replicas, data
) -> None:
    experts = [*range(2 * num_ranks), *([0] * num_ranks if replicas else [])]
    placement = Placement(tuple(experts), 2 * num_ranks, num_ranks, num_ranks)
    case: dict[str, Any] = {
        "placement": placement, "capacity": capacity, "per_token": min(per_token, 2 * num_ranks), "hidden": hidden,
        "wire": Wire(out=out), "device": device,
    }  # fmt: skip
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=num_ranks, max_size=num_ranks))
    case["first"], case["tokens"] = tokens(sizes, case, 0), tokens(sizes[::-1], case, 1)
    arrived, sums, overflowed = ran(SymmetricLowLatency, case)
    twins, twin_sums, twin_overflowed = ran(LowLatency, case)
    assert overflowed == twin_overflowed
    for got, twin, total, twin_total in zip(arrived, twins, sums, twin_sums, strict=True):
        assert torch.equal(got.places_NK, twin.places_NK)
        assert torch.equal(got.filled_Q, twin.filled_Q)
        assert torch.equal(got.slots_MK, twin.slots_MK)
        own = got.slots_MK >= 0
        assert torch.equal(got.weights_MK[own], twin.weights_MK[own])
        assert torch.equal(
            got.rows_QB[got.filled_Q][:, : got.parts.weights], twin.rows_QB[twin.filled_Q][:, : twin.parts.weights]
        )
        assert torch.equal(got.x(torch.float32), twin.x(torch.float32))
        assert torch.equal(total, twin_total)


def test_blocks_of_tokens_stand_behind_each_other(device: str) -> None:
    """More tokens than a program plans: places count on from block to block, also past the capacity."""
    placement = Placement((0, 1, 2, 3, 0, 1), 4, 2, 2)
    case: dict[str, Any] = {
        "placement": placement, "capacity": 280, "per_token": 2, "hidden": 128, "wire": Wire(out="fp8"),
        "device": device, "max_tokens": 530,
    }  # fmt: skip
    case["first"], case["tokens"] = tokens([3, 530], case, 0), tokens([530, 270], case, 1)
    arrived, sums, overflowed = ran(SymmetricLowLatency, case)
    twins, twin_sums, twin_overflowed = ran(LowLatency, case)
    assert overflowed == twin_overflowed == [True, True]
    for got, twin, total, twin_total in zip(arrived, twins, sums, twin_sums, strict=True):
        assert torch.equal(got.places_NK, twin.places_NK)
        assert torch.equal(total, twin_total)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    ranks = Ranks(0, 1, 1, torch.device("cpu"), None, None, None)
    placement = Placement.contiguous(num_experts=2, num_ranks=1)
    sizes = {"hidden": 128, "per_token": 1, "max_tokens": 4}
    shared = Shared(1, "cpu")
    with pytest.raises(ValueError, match="the wire must be FP8 or BF16"):
        SymmetricLowLatency(Exchange(ranks, placement, wire=Wire(back="fp32")), make_mailbox=shared, **sizes)
    form = SymmetricLowLatency(Exchange(ranks, placement), make_mailbox=shared, **sizes)
    with pytest.raises(ValueError, match="5 tokens, at most 4 fit"):
        form.send(torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    assert wire.layout(128, 1, "fp8").row_bytes == form._out.inbox_QB.shape[1]
