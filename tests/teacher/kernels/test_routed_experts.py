"""The routed experts in FP8: alignment, the fused products, and what the whole is in FP64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.kernels.experts import (
    ExpertsPlan,
    ExpertWeights,
    align_twin,
    num_rows,
    routed_experts_fp8,
    routed_experts_twin,
)
from teacher.kernels.quantise import Quantised, quantise, quantise_weight
from teacher.kernels.route import Choice, Routes, route_twin
from teacher.model.fp8 import BLOCK, dequantise_blocks

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 8, 256, 128, 3
ROUTES = Routes(TOP_K, 2, 1, True, 2.5)
PLANS = [None, ExpertsPlan(16, True), ExpertsPlan(32, False), ExpertsPlan(128, False, fused=False)]


@pytest.fixture(scope="module")
def weights(device: str) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            quantise_weight((torch.randn(shape, generator=generator) * 0.06).to(device)) for _ in range(NUM_EXPERTS)
        ]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])

    return ExpertWeights(*stack(2 * INNER, HIDDEN), *stack(HIDDEN, INNER))


def tokens(num_tokens: int, device: str, *, concentrated: bool = False) -> tuple[Quantised, Choice]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16).to(device)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    if concentrated:
        logits[:, :TOP_K] += 100
    return quantise(x), route_twin(logits.to(device), torch.zeros(NUM_EXPERTS, device=device), ROUTES)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("concentrated", [False, True])
def test_the_kernels_equal_the_twin(
    device: str, weights: ExpertWeights, plan: ExpertsPlan | None, concentrated: bool
) -> None:
    for num_tokens in (1, 5, 70):
        x, choice = tokens(num_tokens, device, concentrated=concentrated)
        wanted = routed_experts_twin(x, choice, weights)
        got = routed_experts_fp8(x, choice, weights, plan=plan)
        # The same roundings, but for sums of another order, which turn a rare FP8 rounding and then a BF16 one. A GPU's
        # tensor cores keep 14 bits of fraction, which turns a few more; what is not fused is rounded to BF16 before the
        # SwiGLU, and so are one in thirty.
        fused = 4e-3 if device == "cpu" else 6e-3
        assert error(got, wanted) < (fused if plan is None or plan.fused else 2e-2)
        assert got.dtype == torch.bfloat16


def exact(x: Quantised, choice: Choice, weights: ExpertWeights) -> torch.Tensor:
    """The formula in FP64, of what the operands stand for; nothing is rounded on the way."""
    values = x.values_MK.double() * x.scale_inv_MG.double().repeat_interleave(BLOCK, dim=1)
    wanted = torch.zeros_like(values)
    for token in range(len(values)):
        for expert, gate_weight in zip(choice.indices_NK[token].tolist(), choice.weights_NK[token], strict=True):
            both = (
                values[token]
                @ dequantise_blocks(weights.gate_up_E2ID[expert], weights.gate_up_scale_inv[expert]).double().T
            )
            gate, up = both.chunk(2)
            down = dequantise_blocks(weights.down_EDI[expert], weights.down_scale_inv[expert]).double()
            wanted[token] += gate_weight.double() * (down @ (F.silu(gate) * up))
    return wanted


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_the_twin_is_the_formula(device: str, weights: ExpertWeights) -> None:
    x, choice = tokens(40, device)
    # The intermediate is rounded to E4M3, three bits of mantissa.
    assert error(routed_experts_twin(x, choice, weights), exact(x, choice, weights)) < 0.04


@pytest.mark.parametrize("plan", PLANS)
def test_the_kernels_are_as_exact_as_the_twin(device: str, weights: ExpertWeights, plan: ExpertsPlan | None) -> None:
    x, choice = tokens(70, device)
    wanted = exact(x, choice, weights)
    twin = error(routed_experts_twin(x, choice, weights), wanted)
    assert error(routed_experts_fp8(x, choice, weights, plan=plan), wanted) < 1.05 * twin


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([16, 32]), st.integers(0, 2**20))
def test_alignment_gives_each_pair_one_row_of_its_expert(num_tokens: int, top_k: int, rows: int, seed: int) -> None:
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    indices = scores.topk(top_k).indices.to(torch.int32)
    pairs, experts = align_twin(indices, NUM_EXPERTS, rows)
    assert len(pairs) == num_rows(indices.numel(), NUM_EXPERTS, rows) == len(experts) * rows
    held = pairs[pairs < indices.numel()]
    assert held.sort().values.tolist() == list(range(indices.numel()))
    of_rows = experts.repeat_interleave(rows)[pairs < indices.numel()]
    assert torch.equal(of_rows, indices.flatten()[held.long()])


@pytest.mark.parametrize("concentrated", [False, True])
def test_alignment_on_the_device_equals_its_twin(device: str, concentrated: bool) -> None:
    from teacher.kernels.experts_triton import align_kernel

    for num_tokens, rows in ((1, 16), (9, 32), (700 if device == "cpu" else 9_000, 16)):
        _, choice = tokens(num_tokens, device, concentrated=concentrated)
        got, wanted = (
            align_kernel(choice.indices_NK, choice.load_E, rows),
            align_twin(choice.indices_NK, NUM_EXPERTS, rows),
        )
        assert torch.equal(got.pairs_R, wanted.pairs_R)
        assert torch.equal(got.experts_T, wanted.experts_T)


def test_shapes_that_do_not_belong_together_are_refused(device: str, weights: ExpertWeights) -> None:
    x, choice = tokens(2, device)
    with pytest.raises(ValueError, match="do not belong together"):
        routed_experts_fp8(x, choice, weights._replace(down_EDI=weights.down_EDI[:, :128]))
