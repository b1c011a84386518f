"""The routed experts: every fast form equals the sum written out token by token, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from teacher.model.experts import ROW_ALIGNMENT, _slots, routed_experts


def reference(x, gate_up, down, indices, weights):
    """Equation 12 of DeepSeek-V3, one token and one expert at a time."""
    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros_like(x[0])
        for choice in range(indices.shape[1]):
            expert = indices[token, choice]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            row = row + weights[token, choice] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def problem(num_tokens, num_experts, per_token, hidden=32, inner=16, *, concentrated=False):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    shapes = [(num_tokens, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if concentrated:  # every token wants the same experts: the others get none
        scores = scores[:1].expand(num_tokens, -1)
    weights, indices = scores.topk(per_token, dim=-1)
    return *tensors, indices, weights.double()


@pytest.mark.parametrize("concentrated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize("kind", ["dense", "sorted", "grouped"])
def test_every_form_equals_the_written_out_sum(kind, num_tokens, concentrated):
    x, gate_up, down, indices, weights = problem(num_tokens, 8, 3, concentrated=concentrated)
    leaves = [x, gate_up, down, weights]
    grads = []
    for compute in (
        lambda *a: reference(a[0], a[1], a[2], indices, a[3]),
        # grouped_mm has no FP64 kernel, so it is tried in FP32
        lambda *a: routed_experts(*_cast(kind, a[:3]), indices, a[3], kind=kind).double(),
    ):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        out = compute(*inputs)
        out.square().sum().backward()
        grads.append([out.detach(), *(leaf.grad for leaf in inputs)])
    tolerance = 2e-5 if kind == "grouped" else 1e-9  # FP32 against FP64 sums of at most a few hundred terms
    for got, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def _cast(kind, tensors):
    return [tensor.float() for tensor in tensors] if kind == "grouped" else list(tensors)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True), min_size=1, max_size=70))
def test_slots_are_distinct_aligned_and_in_their_experts_run(choices):
    indices = torch.tensor(choices)
    slots, ends, num_slots = _slots(indices, 7)
    assert slots.flatten().unique().numel() == indices.numel()
    starts = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1]))
    assert (starts % ROW_ALIGNMENT == 0).all()
    assert int(ends[-1]) == num_slots
    assert ((slots >= starts[indices]) & (slots < ends[indices])).all()
