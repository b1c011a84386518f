"""Cases of the kernels that are bound by memory: quantisation, norm, SwiGLU, router, rotation, the write to the cache.

Their results are the twins' to the last bit. Floors count each number once that has to be read or written.

Shape legend: M rows (tokens), K columns, I inner width, E experts, G = K / 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Peer, Work, differing_share
from benchmarks.kernels.inputs import normal
from benchmarks.kernels.peers import group_quantise
from teacher.kernels.attention import rope_cache as rc
from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Routes, route_twin
from teacher.kernels.quantise import quantise as q
from teacher.model.fp8 import BLOCK

V3_ROUTES = Routes(num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5)
HIDDEN, MOE_INNER, DENSE_INNER, EXPERTS = 7_168, 2_048, 18_432, 256
HEADS, LATENT, ROPE, PAGE = 128, 512, 64, 64
EPS = 1e-6
COMPILED_TOLERANCE = 1e-3  # the share of E4M3 numbers that a fused multiply-add may turn


def cases(*, toy: bool) -> Iterator[Case]:
    hidden, inner, wide = (512, 256, 512) if toy else (HIDDEN, MOE_INNER, DENSE_INNER)
    rows = (4, 33) if toy else (128, 4_096, 16_384)
    for columns in (hidden, inner):
        for m in rows:
            yield Case("quantise", f"{m}x{columns}", partial(_quantise, m, columns))
    for added in (False, True):
        for m in rows:
            name = "rms_norm_quantise" + (" + residual" if added else "")
            yield Case(name, f"{m}x{hidden}", partial(_norm, m, hidden, added))
    for width in (inner, wide):
        for m in rows:
            yield Case("swiglu_quantise", f"{m}x{2 * width}->{width}", partial(_swiglu, m, width))
    yield Case("quantise_weight", f"{wide}x{hidden}", partial(_weight, wide, hidden))
    for m in (1, 9) if toy else (1, 128, 4_096, 16_384):
        yield Case("route", f"{m}x{EXPERTS}", partial(_route, m))
    for m in (3,) if toy else (1, 128, 4_096):
        yield Case("write_latent", f"{m}x{LATENT + ROPE}", partial(_write_latent, m))
        yield Case("rotate_queries", f"{m}x{HEADS}x{ROPE}", partial(_rotate_queries, m))


def _peers(size_bytes: int, device: torch.device, twin: Callable[..., Any]) -> dict[str, Peer]:
    return _copy(size_bytes, device) | _compiled_peer(device, twin)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _compiled_peer(device: torch.device, function: Callable[..., Any]) -> dict[str, Peer]:
    """The twin through TorchInductor. Its C++ for a CPU is left out: it takes minutes to build, and nobody asks."""
    if device.type != "cuda":
        return {}
    return {"torch.compile": Peer(lambda inputs: _compiled(function)(*inputs), tolerance=COMPILED_TOLERANCE)}


def _copy(size_bytes: int, device: torch.device) -> dict[str, Peer]:
    """A copy that reads and writes as many bytes in all: what memory takes at this size, where a large copy's bandwidth
    leaves out how it begins and ends."""
    words = size_bytes // 8 // 1024 * 1024  # round: some others took half as long again
    return {
        "copy": Peer(Tensor.clone, prepare=lambda _: torch.randint(1 << 30, (words,), dtype=torch.int32, device=device))
    }


def _scale_bytes(rows: int, columns: int) -> int:
    return 4 * rows * (columns // BLOCK)


def _quantise(m: int, k: int, device: torch.device) -> Work:
    size = 3 * m * k + _scale_bytes(m, k)
    return Work(
        run=lambda inputs: q.quantise(*inputs),
        make=lambda index: (normal(device, index, m, k),),
        error=lambda got, inputs: differing_share(got, q.quantise_twin(*inputs)),
        tolerance=0.0,
        size_bytes=size,
        peers=lambda: (
            _peers(size, device, q.quantise_twin) | {"vLLM per_token_group_quant_fp8": group_quantise(device)}
        ),
    )


def _norm(m: int, k: int, added: bool, device: torch.device) -> Work:
    size = (7 if added else 3) * m * k + 2 * k + _scale_bytes(m, k)

    def make(index: int) -> tuple[Any, ...]:
        weight = normal(device, index, k)
        return normal(device, index + 1, m, k), weight, normal(device, index + 2, m, k) if added else None

    def with_kernel(inputs: tuple[Any, ...]) -> Any:
        return q.rms_norm_quantise(*inputs[:2], EPS, add_MK=inputs[2])

    def with_twin(x: Tensor, weight: Tensor, add: Tensor | None) -> Any:
        return q.rms_norm_quantise_twin(x, weight, EPS, add_MK=add)

    def numbers(normed: q.NormOutput) -> tuple[Tensor, ...]:
        return (*normed.quantised, normed.residual_MK)

    return Work(
        run=with_kernel,
        make=make,
        error=lambda got, inputs: differing_share(numbers(got), numbers(with_twin(*inputs))),
        tolerance=0.0,
        size_bytes=size,
        peers=lambda: _peers(size, device, _norm_added if added else _norm_alone),
    )


def _norm_alone(x: Tensor, weight: Tensor, _: None) -> q.NormOutput:
    return q.rms_norm_quantise_twin(x, weight, EPS)


def _norm_added(x: Tensor, weight: Tensor, add: Tensor) -> q.NormOutput:
    return q.rms_norm_quantise_twin(x, weight, EPS, add_MK=add)


def _swiglu(m: int, inner: int, device: torch.device) -> Work:
    size = 5 * m * inner + _scale_bytes(m, inner)
    return Work(
        run=lambda inputs: q.swiglu_quantise(*inputs),
        make=lambda index: (normal(device, index, m, 2 * inner),),
        error=lambda got, inputs: differing_share(got, q.swiglu_quantise_twin(*inputs)),
        tolerance=0.0,
        size_bytes=size,
        peers=lambda: _peers(size, device, q.swiglu_quantise_twin),
    )


def _weight(rows: int, columns: int, device: torch.device) -> Work:
    size = 3 * rows * columns + 4 * -(-rows // BLOCK) * -(-columns // BLOCK)
    return Work(
        run=lambda inputs: q.quantise_weight(*inputs),
        make=lambda index: (normal(device, index, rows, columns),),
        error=lambda got, inputs: differing_share(got, q.quantise_blocks(*inputs)),
        tolerance=0.0,
        size_bytes=size,
        peers=lambda: _peers(size, device, q.quantise_blocks),
    )


def _route(m: int, device: torch.device) -> Work:
    size = m * (4 * EXPERTS + 8 * V3_ROUTES.num_experts_per_tok) + 8 * EXPERTS

    def make(index: int) -> tuple[Tensor, Tensor]:
        bias = normal(device, index, EXPERTS, dtype=torch.float32) * 0.01
        return normal(device, index + 1, m, EXPERTS, dtype=torch.float32), bias

    return Work(
        run=lambda inputs: route(*inputs, V3_ROUTES),
        make=make,
        error=lambda got, inputs: differing_share(got, route_twin(*inputs, V3_ROUTES)),
        tolerance=0.0,
        size_bytes=size,
    )


def _rotation(device: torch.device) -> tuple[Tensor, Tensor]:
    angles = normal(device, 0, 4_096, ROPE // 2, dtype=torch.float32)
    return angles.cos(), angles.sin()


def _write_latent(m: int, device: torch.device) -> Work:
    width = LATENT + ROPE
    size = m * (4 * width + 4 * ROPE + 16) + 2 * LATENT
    rotation = _rotation(device)

    def make(index: int) -> tuple[Any, ...]:
        cache_LPE = torch.full((-(-m // PAGE), PAGE, width), float("nan"), dtype=torch.bfloat16, device=device)
        slots = torch.randperm(cache_LPE.shape[0] * PAGE, device=device)[:m]
        positions = torch.randint(0, len(rotation[0]), (m,), device=device)
        weight = normal(device, index, LATENT)
        return normal(device, index + 1, m, width), weight, EPS, rotation, positions, slots, cache_LPE

    def with_kernel(inputs: tuple[Any, ...]) -> Tensor:
        rc.write_latent(*inputs, interleave=True)
        return inputs[-1]

    def error(got: Tensor, inputs: tuple[Any, ...]) -> float:
        own = torch.full_like(got, float("nan"))
        rc.write_latent_twin(*inputs[:-1], own, interleave=True)
        return differing_share([got], [own])

    return Work(with_kernel, make, error, tolerance=0.0, size_bytes=size)


def _rotate_queries(m: int, device: torch.device) -> Work:
    size = m * (4 * HEADS * ROPE + 4 * ROPE + 8)
    rotation = _rotation(device)

    def make(index: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(m, device=device) * 7 % len(rotation[0])
        return normal(device, index, m, HEADS, LATENT + ROPE), positions

    def with_kernel(inputs: tuple[Tensor, Tensor]) -> Tensor:
        rc.rotate_queries(inputs[0], rotation, inputs[1], latent=LATENT, interleave=True)
        return inputs[0]

    def error(got: Tensor, inputs: tuple[Tensor, Tensor]) -> float:
        own, positions = make(0)  # the first set as it was before it was turned
        rc.rotate_queries_twin(own, rotation, positions, latent=LATENT, interleave=True)
        return differing_share([got], [own])

    return Work(with_kernel, make, error, tolerance=0.0, size_bytes=size)
