"""The block-scaled product against FP64, in every form that a tiling can choose."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.timing import poisoned
from teacher.kernels.dense.gemm import block_gemm, default_tiling
from teacher.kernels.dense.gemm_arrivals import LEAST, arrival_counters
from teacher.kernels.dense.reference import GemmTiling, block_gemm_twin
from teacher.kernels.quantise.quantise import quantise, quantise_weight
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK, dequantise_blocks

V3_SHAPES = [(24_576, 1_536), (32_768, 512), (7_168, 16_384), (4_096, 7_168), (7_168, 2_048), (2_112, 7_168)]
SMALL_SHAPES = [(200, 512), (128, 256), (320, 384)]
TILINGS = [
    None,
    GemmTiling(16, 64, 3, True),
    GemmTiling(32, 128, 2),
    GemmTiling(64, 32),
    GemmTiling(16, 128, 8, True),
    GemmTiling(64, 64, 4, True),
    GemmTiling(128, 64, 2, True),
    GemmTiling(16, 128, loader=True, weights_first=True),
    GemmTiling(64, 64, 4, True, loader=True),
    GemmTiling(128, 64, 2, True, loader=True),
]
SPLIT = [tiling for tiling in TILINGS if tiling and tiling.splits > 1]


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


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling_is_as_exact_as_the_twin(device: str, tiling: GemmTiling | None) -> None:
    shapes = V3_SHAPES if device == "cuda" else SMALL_SHAPES
    for num_rows, (num_columns, num_inner) in zip((1, 17, 150, 64, 3, 128), shapes, strict=False):
        given = operands(num_rows, num_columns, num_inner, device)
        wanted = exact(*given)
        twin = error(block_gemm_twin(*given, dtype=torch.float32), wanted)
        got = block_gemm(*given, dtype=torch.float32, tiling=tiling)
        # On a GPU the sums inside a group of 128 are the tensor cores', with their 14 bits of fraction.
        assert error(got, wanted) < (1.05 * twin + 1e-8 if device == "cpu" else 2e-3)
        assert error(block_gemm(*given, tiling=tiling), wanted) < 2.0**-8  # BF16


@pytest.mark.parametrize("tiling", SPLIT)
def test_repeats_are_the_same_to_the_last_bit(device: str, tiling: GemmTiling) -> None:
    given = operands(20, 200, 512, device) if device == "cpu" else operands(70, 2_112, 7_168, device)
    first = block_gemm(*given, tiling=tiling)
    assert all(torch.equal(block_gemm(*given, tiling=tiling), first) for _ in range(3 if device == "cpu" else 100))


@pytest.mark.parametrize("tiling", SPLIT)
def test_the_counters_are_zero_again(device: str, tiling: GemmTiling) -> None:
    given = operands(20, 200, 512, device)
    counters = arrival_counters(given[1].device, 1)
    block_gemm(*given, tiling=tiling)
    assert not counters.any()
    counters.add_(tiling.splits)  # what a launch finds there does count: now no program is the last to arrive
    try:
        with poisoned():
            assert block_gemm(*given, tiling=tiling).isnan().all()
    finally:
        counters.zero_()


def test_more_tiles_than_counters_give_more_counters(device: str) -> None:
    counters = arrival_counters(torch.device(device), 3 * LEAST)
    assert counters.numel() >= 3 * LEAST
    assert not counters.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tiling", SPLIT)
def test_graphs_replayed_at_the_same_time_do_not_share_counters(device: str, tiling: GemmTiling) -> None:
    given = [operands(64, 2_112, 7_168, device), operands(61, 2_112, 7_168, device)]
    wanted = [block_gemm(*one, tiling=tiling) for one in given]
    graphs, got = [torch.cuda.CUDAGraph() for _ in given], []
    for graph, one in zip(graphs, given, strict=True):
        with torch.cuda.graph(graph):
            got.append([block_gemm(*one, tiling=tiling) for _ in range(20)])
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
def test_the_default_tiling_fills_a_gpu_with_few_rows(num_rows: int, num_columns: int, num_inner: int) -> None:
    tiling = default_tiling(num_rows, num_columns, num_inner // BLOCK)
    assert tiling.rows >= min(num_rows, 128)
    assert tiling.splits == 1 or num_inner // BLOCK // tiling.splits >= 4
    if num_rows <= 64 and num_inner >= 7_168:
        assert -(-num_columns // tiling.columns) * tiling.splits >= 100
