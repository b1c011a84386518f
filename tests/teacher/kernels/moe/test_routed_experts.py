"""The routed experts in FP8: alignment, the fused products, and what the whole is in FP64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from teacher.kernels.dense.reference import block_gemm_twin
from teacher.kernels.device import runs_hopper_kernels
from teacher.kernels.moe.experts import routed_experts_fp8
from teacher.kernels.moe.reference import (
    ExpertsTiling,
    ExpertWeights,
    Grouping,
    align_twin,
    num_rows,
    routed_experts_twin,
)
from teacher.kernels.moe.route_reference import Choice, Routes, route_twin
from teacher.kernels.quantise.quantise import quantise, quantise_weight
from teacher.kernels.quantise.reference import Quantised, swiglu_quantise_twin
from teacher.model.fp8 import BLOCK, dequantise_blocks

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 8, 256, 128, 3
ROUTES = Routes(TOP_K, 2, 1, True, 2.5)
TILINGS = [None, ExpertsTiling(16, True), ExpertsTiling(64, False, 4, 2, 3), ExpertsTiling(128, False, fused=False)]


@pytest.fixture(scope="module")
def weights(device: str) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            quantise_weight((torch.randn(shape, generator=generator) * 0.06).to(device)) for _ in range(NUM_EXPERTS)
        ]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])

    return ExpertWeights(*stack(2 * INNER, HIDDEN), *stack(HIDDEN, INNER))


def on_hopper(device: str) -> bool:
    return runs_hopper_kernels(torch.device(device, 0) if device == "cuda" else torch.device(device))


def tokens(num_tokens: int, device: str, *, concentrated: bool = False) -> tuple[Quantised, Choice]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16).to(device)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    if concentrated:
        logits[:, :TOP_K] += 100
    return quantise(x), route_twin(logits.to(device), torch.zeros(NUM_EXPERTS, device=device), ROUTES)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("concentrated", [False, True])
def test_the_kernels_equal_the_twin(
    device: str, weights: ExpertWeights, tiling: ExpertsTiling | None, concentrated: bool
) -> None:
    # 400 tokens fill tiles of 128 rows, halves of them and tails; interpreted, they would take minutes, and so would
    # such a tile for each of eight experts.
    few = (1,) if tiling is not None and tiling.rows == 128 and not concentrated else (1, 70)
    for num_tokens in few if device == "cpu" else (1, 5, 70, 345, 400):
        x, choice = tokens(num_tokens, device, concentrated=concentrated)
        wanted = routed_experts_twin(x, choice, weights)
        got = routed_experts_fp8(x, choice, weights, tiling=tiling)
        # The same roundings, but for sums of another order, which turn a rare FP8 rounding and then a BF16 one. A GPU's
        # tensor cores keep 14 bits of fraction, which turns a few more; what is not fused is rounded to BF16 before the
        # SwiGLU, and so are one in thirty. On Hopper all is fused.
        fused = tiling is None or tiling.fused or on_hopper(device)
        assert error(got, wanted) < (2e-2 if not fused else 4e-3 if device == "cpu" else 6e-3)
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


@pytest.mark.parametrize("tiling", TILINGS)
def test_the_kernels_are_as_exact_as_the_twin(
    device: str, weights: ExpertWeights, tiling: ExpertsTiling | None
) -> None:
    x, choice = tokens(70, device, concentrated=device == "cpu")
    wanted = exact(x, choice, weights)
    twin = error(routed_experts_twin(x, choice, weights), wanted)
    assert error(routed_experts_fp8(x, choice, weights, tiling=tiling), wanted) < 1.05 * twin


@pytest.mark.parametrize("tiling", TILINGS)
def test_choices_that_are_served_elsewhere_count_for_nothing(
    device: str, weights: ExpertWeights, tiling: ExpertsTiling | None
) -> None:
    x, choice = tokens(9, device)
    first = NUM_EXPERTS // 4  # within a group of experts: some tokens have choices here and elsewhere
    here = choice.indices_NK >= first
    assert (here.any(dim=1) & ~here.all(dim=1)).any()
    indices = torch.where(here, choice.indices_NK - first, -1)
    load = choice.load_E[first:]
    part = ExpertWeights(*(of_all[first:] for of_all in weights))
    got = routed_experts_fp8(x, Choice(indices, choice.weights_NK, load), part, tiling=tiling)
    # The same products, of the same experts by other numbers; what is left out is left out by a weight of zero.
    weighted = choice._replace(weights_NK=torch.where(here, choice.weights_NK, 0.0))
    assert torch.equal(got, routed_experts_fp8(x, weighted, weights, tiling=tiling))
    twin = routed_experts_twin(x, Choice(indices, choice.weights_NK, load), part)
    assert torch.equal(twin, routed_experts_twin(x, weighted, weights))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([16, 32]), st.integers(0, 2**20))
def test_alignment_gives_each_pair_one_row_of_its_expert(num_tokens: int, top_k: int, rows: int, seed: int) -> None:
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    indices = scores.topk(top_k).indices.to(torch.int32)
    pairs, experts, loads = align_twin(indices, NUM_EXPERTS, rows)
    assert loads.tolist() == [int((indices == expert).sum()) for expert in range(NUM_EXPERTS)]
    assert len(pairs) == num_rows(indices.numel(), NUM_EXPERTS, rows) == len(experts) * rows
    held = pairs[pairs < indices.numel()]
    assert held.sort().values.tolist() == list(range(indices.numel()))
    of_rows = experts.repeat_interleave(rows)[pairs < indices.numel()]
    assert torch.equal(of_rows, indices.flatten()[held.long()])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=20), st.sampled_from([0, 16]))
def test_units_hold_every_row_once_and_those_with_a_tail_come_first(device: str, loads: list[int], tail: int) -> None:
    from teacher.kernels.moe.experts_prefill import list_units
    from teacher.kernels.moe.units import FULL_UNIT, HALF_UNIT, TAILED_UNIT, UNIT_KINDS

    load_E = torch.tensor(loads, dtype=torch.int32, device=device)
    tiles_E = -(-load_E // BLOCK)
    experts_T = torch.empty(int(tiles_E.sum()) + 2, dtype=torch.int32, device=device)
    count, *units = list_units(Grouping(load_E, experts_T, load_E), tail).tolist()
    held: dict[int, int] = {}
    for unit in units[:count]:
        tile, kind = divmod(unit, UNIT_KINDS)
        held[tile] = {FULL_UNIT: BLOCK, TAILED_UNIT: BLOCK, HALF_UNIT: BLOCK // 2}[kind]
        if kind == TAILED_UNIT:
            held[tile + 1] = tail
    wanted, first = {}, 0
    for load, num_tiles in zip(loads, tiles_E.tolist(), strict=True):
        for tile in range(num_tiles):
            rest = min(BLOCK, load - tile * BLOCK)
            room = [tail, BLOCK // 2, BLOCK] if tile else [BLOCK // 2, BLOCK]
            wanted[first + tile] = next(rows for rows in room if rest <= rows)
        first += num_tiles
    assert held == wanted
    kinds = [unit % UNIT_KINDS == TAILED_UNIT for unit in units[:count]]
    assert kinds == sorted(kinds, reverse=True)


def test_fused_products_on_hopper_equal_the_twin(device: str) -> None:
    """Each number of rows beside a border of a tile, a half and a tail; outputs poisoned, widths that fill no pair."""
    if not on_hopper(device):
        pytest.skip("Gluon has no interpreter")
    from teacher.kernels.moe.experts_prefill import list_units
    from teacher.kernels.moe.sm90_experts import TAIL_ROWS, down_hopper, gate_up_hopper

    hidden, inner = 3 * BLOCK, 5 * BLOCK
    loads = [0, 1, 64, 65, 127, 128, 129, 128 + TAIL_ROWS, 129 + TAIL_ROWS, 192, 193, 272, 273, 512, 3]
    generator = torch.Generator(device).manual_seed(5)

    def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [quantise_weight(torch.randn(shape, generator=generator, device=device) * 0.06) for _ in loads]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])

    weights = ExpertWeights(*stack(2 * inner, hidden), *stack(hidden, inner))
    indices = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads)).to(torch.int32)
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(6))].unsqueeze(1)
    alignment = align_twin(indices, len(loads), BLOCK)
    assert alignment.load_E.tolist() == loads
    grouping = Grouping(*(part.to(device) for part in alignment))
    rows = quantise(torch.randn(len(alignment.pairs_R), hidden, generator=generator, device=device).bfloat16())
    units = {"experts_T": grouping.experts_T, "units_U": list_units(grouping, TAIL_ROWS)}
    got = gate_up_hopper(rows, weights.gate_up_E2ID, weights.gate_up_scale_inv, **units)
    out = torch.full((len(alignment.pairs_R), hidden), float("nan"), dtype=torch.bfloat16, device=device)
    down_hopper(got, weights.down_EDI, weights.down_scale_inv, out, **units)
    of_rows = alignment.experts_T.repeat_interleave(BLOCK)
    turned = 0
    for expert in range(len(loads)):
        mine = ((of_rows == expert) & (alignment.pairs_R < len(indices))).nonzero().flatten().to(device)
        part = Quantised(rows.values_MK[mine], rows.scale_inv_MG[mine])
        gate_up = weights.gate_up_E2ID[expert], weights.gate_up_scale_inv[expert]
        wanted = swiglu_quantise_twin(block_gemm_twin(part, *gate_up, dtype=torch.float32))
        inner_part = Quantised(got.values_MK[mine], got.scale_inv_MG[mine])
        turned += int((inner_part.values_MK.view(torch.uint8) != wanted.values_MK.view(torch.uint8)).sum())
        assert torch.allclose(inner_part.scale_inv_MG, wanted.scale_inv_MG, rtol=2e-3, atol=0)
        down = weights.down_EDI[expert], weights.down_scale_inv[expert]
        if len(mine):  # one BF16 rounding, of sums of another order
            assert error(out[mine], block_gemm_twin(inner_part, *down, dtype=torch.float32)) < 4e-3
    # Sums of another order, of the tensor cores' 14 bits: two E4M3 roundings in a hundred turn.
    assert turned <= 3e-2 * sum(loads) * inner


@pytest.mark.parametrize("concentrated", [False, True])
@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 16), (9, 32), (700, 16), (1_500, 128), (4_097, 16)])
def test_alignment_on_the_device_equals_its_twin(device: str, num_tokens: int, rows: int, concentrated: bool) -> None:
    from teacher.kernels.moe.align_triton import align_kernel

    _, choice = tokens(num_tokens, device, concentrated=concentrated)
    for first in (0, 3):  # experts before it are elsewhere
        indices = torch.where(choice.indices_NK >= first, choice.indices_NK - first, -1)
        rows_NK = torch.full_like(indices, -1)
        got = align_kernel(indices, choice.load_E[first:].contiguous(), rows, rows_NK=rows_NK)
        wanted = align_twin(indices, NUM_EXPERTS - first, rows)
        assert torch.equal(got.pairs_R, wanted.pairs_R)
        assert torch.equal(got.experts_T, wanted.experts_T)
        assert torch.equal(got.load_E, wanted.load_E)
        places = (wanted.pairs_R < indices.numel()).nonzero().flatten()
        expected = torch.full_like(rows_NK.flatten(), -1)
        expected[wanted.pairs_R[places].long()] = places.to(torch.int32)
        assert torch.equal(rows_NK.flatten(), expected)


def test_shapes_that_do_not_belong_together_are_refused(device: str, weights: ExpertWeights) -> None:
    x, choice = tokens(2, device)
    with pytest.raises(ValueError, match="do not belong together"):
        routed_experts_fp8(x, choice, weights._replace(down_EDI=weights.down_EDI[:, :128]))
