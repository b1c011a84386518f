"""The block-scaled product against FP64, in every form that a plan can choose."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.timing import poisoned
from teacher.kernels.gemm import GemmPlan, block_gemm, block_gemm_twin, default_plan
from teacher.kernels.gemm_arrivals import LEAST, arrival_counters
from teacher.kernels.quantise import Quantised, quantise, quantise_weight
from teacher.model.fp8 import BLOCK, dequantise_blocks

V3_SHAPES = [(24_576, 1_536), (32_768, 512), (7_168, 16_384), (4_096, 7_168), (7_168, 2_048), (2_112, 7_168)]
SMALL_SHAPES = [(200, 512), (128, 256), (320, 384)]
PLANS = [
    None,
    GemmPlan(16, 64, 3, True),
    GemmPlan(32, 128, 2),
    GemmPlan(64, 32),
    GemmPlan(16, 128, 8, True),
    GemmPlan(64, 64, 4, True),
    GemmPlan(128, 64, 2, True),
    GemmPlan(16, 128, loader=True, weights_first=True),
    GemmPlan(64, 64, 4, True, loader=True),
    GemmPlan(128, 64, 2, True, loader=True),
]
SPLIT = [plan for plan in PLANS if plan and plan.splits > 1]


def operands(
    num_rows: int, num_columns: int, num_inner: int, device: str
) -> tuple[Quantised, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    x = torch.randn(num_rows, num_inner, generator=generator).to(torch.bfloat16).to(device)
    weight = (torch.randn(num_columns, num_inner, generator=generator) * 0.02).to(device)
    return quantise(x), *quantise_weight(weight)


def exact(x: Quantised, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """The product of what the operands stand for, in FP64."""
    values = x.values_MK.double() * x.scale_inv_MG.double().repeat_interleave(BLOCK, dim=1)
    return values @ dequantise_blocks(weight, scale_inv).double().T


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_as_exact_as_the_twin(device: str, plan: GemmPlan | None) -> None:
    shapes = V3_SHAPES if device == "cuda" else SMALL_SHAPES
    for num_rows, (num_columns, num_inner) in zip((1, 17, 150, 64, 3, 128), shapes, strict=False):
        given = operands(num_rows, num_columns, num_inner, device)
        wanted = exact(*given)
        twin = error(block_gemm_twin(*given, dtype=torch.float32), wanted)
        got = block_gemm(*given, dtype=torch.float32, plan=plan)
        # On a GPU the sums inside a group of 128 are the tensor cores', with their 14 bits of fraction.
        assert error(got, wanted) < (1.05 * twin + 1e-8 if device == "cpu" else 2e-3)
        assert error(block_gemm(*given, plan=plan), wanted) < 2.0**-8  # BF16


@pytest.mark.parametrize("plan", SPLIT)
def test_repeats_are_the_same_to_the_last_bit(device: str, plan: GemmPlan) -> None:
    given = operands(20, 200, 512, device) if device == "cpu" else operands(70, 2_112, 7_168, device)
    first = block_gemm(*given, plan=plan)
    assert all(torch.equal(block_gemm(*given, plan=plan), first) for _ in range(3 if device == "cpu" else 100))


@pytest.mark.parametrize("plan", SPLIT)
def test_the_counters_are_zero_again(device: str, plan: GemmPlan) -> None:
    given = operands(20, 200, 512, device)
    counters = arrival_counters(given[1].device, 1)
    block_gemm(*given, plan=plan)
    assert not counters.any()
    counters.add_(plan.splits)  # what a launch finds there does count: now no program is the last to arrive
    try:
        with poisoned():
            assert block_gemm(*given, plan=plan).isnan().all()
    finally:
        counters.zero_()


def test_more_tiles_than_counters_give_more_counters(device: str) -> None:
    counters = arrival_counters(torch.device(device), 3 * LEAST)
    assert counters.numel() >= 3 * LEAST
    assert not counters.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("plan", SPLIT)
def test_graphs_replayed_at_the_same_time_do_not_share_counters(device: str, plan: GemmPlan) -> None:
    given = [operands(64, 2_112, 7_168, device), operands(61, 2_112, 7_168, device)]
    wanted = [block_gemm(*one, plan=plan) for one in given]
    graphs, got = [torch.cuda.CUDAGraph() for _ in given], []
    for graph, one in zip(graphs, given, strict=True):
        with torch.cuda.graph(graph):
            got.append([block_gemm(*one, plan=plan) for _ in range(20)])
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for results, result in zip(got, wanted, strict=True):
            assert all(torch.equal(one, result) for one in results)


def test_no_rows_give_no_rows(device: str) -> None:
    x, weight, scale_inv = operands(4, 128, 256, device)
    assert block_gemm(Quantised(x.values_MK[:0], x.scale_inv_MG[:0]), weight, scale_inv).shape == (0, 128)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    x, weight, scale_inv = operands(4, 200, 256, "cpu")
    with pytest.raises(ValueError, match="must be"):
        block_gemm(x, weight, scale_inv[:1])
    with pytest.raises(ValueError, match="must be"):
        block_gemm(x, weight[:, :128], scale_inv)


@pytest.mark.parametrize("num_rows", [1, 16, 64, 65, 4_096])
@pytest.mark.parametrize(("num_columns", "num_inner"), V3_SHAPES)
def test_the_default_plan_fills_a_gpu_with_few_rows(num_rows: int, num_columns: int, num_inner: int) -> None:
    plan = default_plan(num_rows, num_columns, num_inner // BLOCK)
    assert plan.rows >= min(num_rows, 128)
    assert plan.splits == 1 or num_inner // BLOCK // plan.splits >= 4
    if num_rows <= 64 and num_inner >= 7_168:
        assert -(-num_columns // plan.columns) * plan.splits >= 100
