"""Cases of the block-scaled product at the seven shapes of a DeepSeek-V3 layer, and their sum for each number of rows.

Shape legend: M rows (tokens), N columns (outputs), K inner, G = K / 128, P = ceil(N / 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Peer, PeerMissing, Work, relative_error
from benchmarks.kernels.inputs import Operands, normal
from benchmarks.kernels.peers import cutlass_block_gemm, triton_block_gemm
from teacher.kernels.dense.gemm import block_gemm, fastest_gemm
from teacher.kernels.quantise.quantise import quantise, quantise_weight
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK, dequantise_blocks

# q_b, kv_b, o of MLA; gate and up of the dense MLP's half, of the shared expert; its down; q_a and kv_a together.
V3_SHAPES = (
    (24_576, 1_536),
    (32_768, 512),
    (7_168, 16_384),
    (18_432, 7_168),
    (4_096, 7_168),
    (7_168, 2_048),
    (2_112, 7_168),
)
TOY_SHAPES = ((384, 256), (200, 512))
ROWS = (1, 16, 64, 128, 1_024, 4_096)
TOY_ROWS, TOY_LARGE = (1, 20, 150), 100
LARGE = 1_024  # from here the dispatched kernel may be the library's: ours is timed beside it
TOLERANCE = 2.0**-8  # of BF16, against FP64; the tensor cores' short accumulators stay below it
BF16_TOLERANCE = 2.0**-7  # the weights are rounded to BF16 too


def cases(*, toy: bool) -> Iterator[Case]:
    for m in TOY_ROWS if toy else ROWS:
        for own in (False, True) if m >= (TOY_LARGE if toy else LARGE) else (False,):
            kernel = "block_gemm" + (" (own)" if own else "")
            for n, k in TOY_SHAPES if toy else V3_SHAPES:
                yield Case(kernel, f"{m} x {n}x{k}", partial(_product, m, n, k, own), total=f"{m} x all shapes")


def _product(m: int, n: int, k: int, own: bool, device: torch.device) -> Work:
    size = n * k + m * k + 2 * m * n
    tiling = fastest_gemm(device, m, n, k).tiling if own else None

    return Work(
        run=lambda given: block_gemm(*given, tiling=tiling),
        make=lambda seed: operands(device, seed, m, n, k),
        error=lambda got, given: relative_error(got, exact_product(given)),
        tolerance=TOLERANCE,
        size_bytes=size,
        flop=2 * m * n * k,
        product="fp8",
        peers=dict if own else partial(_peers, m, device),
    )


def operands(device: torch.device, seed: int, m: int, n: int, k: int) -> Operands:
    x = quantise(normal(device, seed, m, k))
    return Operands(x, *quantise_weight(normal(device, seed + 1_000, n, k) * 0.02))


def exact_product(given: Operands) -> Tensor:
    """The product of what the operands stand for, in FP64."""
    return _dequantised(given.x).double() @ dequantise_blocks(given.weight_NK, given.scale_inv_PG).double().T


def _dequantised(x: Quantised) -> Tensor:
    return x.values_MK.float() * x.scale_inv_MG.repeat_interleave(BLOCK, dim=1)


def _peers(m: int, device: torch.device) -> dict[str, Peer | PeerMissing]:
    return {
        "torch BF16": Peer(lambda pair: pair[0] @ pair[1].t(), prepare=_as_bf16, tolerance=BF16_TOLERANCE),
        "torch._scaled_mm": scaled_mm(m, device),
        "vLLM CUTLASS": cutlass_block_gemm(device, TOLERANCE),
        "vLLM Triton": triton_block_gemm(device, TOLERANCE),
    }


def _as_bf16(given: Operands) -> tuple[Tensor, Tensor]:
    return _dequantised(given.x).bfloat16(), dequantise_blocks(given.weight_NK, given.scale_inv_PG).bfloat16()


def scaled_mm(m: int, device: torch.device) -> Peer | PeerMissing:
    """cuBLASLt with 1x128 by 128x128 factors: Hopper, CUDA 12.9 or later."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return PeerMissing("its blocks of 128 need a Hopper GPU")
    if m % 4:
        return PeerMissing(f"takes a multiple of four rows, not {m}")

    def run(given: Operands) -> Tensor:
        values, scales = given.x
        factors = scales, given.scale_inv_PG.t()
        return torch._scaled_mm(values, given.weight_NK.t(), *factors, out_dtype=torch.bfloat16)

    return Peer(run, tolerance=TOLERANCE)
