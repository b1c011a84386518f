"""Sizes, inputs, checks and clocks that the sections of `benchmarks.parallel` share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from teacher.model.fp8 import BLOCK
from teacher.parallel.exchange import wire
from teacher.parallel.exchange.dispatch import Exchange
from teacher.parallel.exchange.wire import Wire
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import Placement

LAUNCHES = 10  # in a graph, or between two events
REPLAYS = 20
ERROR = 2**-7  # of the largest number: BF16 on the way back rounds each rank's share by 2^-9 of it, and their sum


class Sizes(NamedTuple):
    hidden: int
    experts: int
    per_token: int
    decode_tokens: int
    prefill_tokens: int
    large_bytes: int  # a peer
    inner: int  # of an expert
    groups: tuple[int, int]  # of experts: all, and those that a token may choose from


FULL = Sizes(7168, 256, 8, 128, 4096, 256 << 20, 2048, (8, 4))
TOY = Sizes(256, 16, 4, 8, 64, 1 << 16, 128, (4, 2))


@dataclass
class Row:
    what: str
    ranks: int
    shape: str
    us: float | None
    floor_us: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    gb_per_s: float | None = None  # that leave a rank
    error: float | None = None
    failed: str | None = None


def exchange_of(ranks: Ranks, sizes: Sizes) -> Exchange:
    return Exchange(ranks, placement_of(ranks, sizes), wire=Wire(out="fp8", back="bf16"))


def placement_of(ranks: Ranks, sizes: Sizes) -> Placement:
    return Placement.contiguous(num_experts=sizes.experts, num_ranks=ranks.num_ranks)


def layer_input(ranks: Ranks, sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x BF16, experts drawn evenly, weights that sum to 2.5 (V3's routed_scaling_factor)."""
    generator = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    scores, indices = torch.rand(tokens, sizes.experts, generator=generator).topk(sizes.per_token, dim=1)
    weights = 2.5 * scores / scores.sum(dim=1, keepdim=True)
    return x.to(ranks.device), indices.to(ranks.device), weights.to(ranks.device)


def scaled(x_MD: Tensor, arrived: Any) -> Tensor:
    """The output of experts that return their token: each row times the sum of this rank's weights."""
    share_M = torch.where(arrived.slots_MK >= 0, arrived.weights_MK, 0.0).sum(dim=1)
    return (x_MD.float() * share_M.unsqueeze(1)).to(torch.bfloat16)


def wrong_by(x: Tensor, weights: Tensor, out: Tensor) -> float:
    """The largest error over the largest number. Raises RuntimeError where it is more than roundings explain."""
    values, scale_inv = wire.quantise(x)
    wanted = values.float() * scale_inv.repeat_interleave(BLOCK, dim=1) * weights.sum(dim=1, keepdim=True)
    error = float((out.float() - wanted).abs().max() / wanted.abs().max())
    if not error <= ERROR:  # NaN is not
        raise RuntimeError(f"the result is wrong: error {error:.2e}, at most {ERROR:.1e} is right")
    return error


def row_of(
    ranks: Ranks, sizes: Sizes, what: str, tokens: int, us: float, leaving: int, peers: dict[str, float], error: float
) -> Row:
    bytes_per_us = sizes.large_bytes * (ranks.num_ranks - 1) / large_us(ranks, sizes.large_bytes)
    return Row(
        what, ranks.num_ranks, shape_of(sizes, tokens), us, leaving / bytes_per_us, peers, leaving / us / 1e3, error
    )


def shape_of(sizes: Sizes, tokens: int) -> str:
    return f"{tokens} x {sizes.hidden}, {sizes.per_token} of {sizes.experts}"


def large_us(ranks: Ranks, num_bytes: int) -> float:
    return all_to_all_us(ranks, [num_bytes] * ranks.num_ranks, graph=False)


def all_to_all_us(ranks: Ranks, send: list[int], receive: list[int] | None = None, *, graph: bool) -> float:
    """Bytes to each rank and from each; equal parts where `receive` is left out."""
    sent = torch.ones(sum(send), dtype=torch.uint8, device=ranks.device)
    received = torch.empty(sum(receive or send), dtype=torch.uint8, device=ranks.device)

    def run() -> Tensor:
        dist.all_to_all_single(received, sent, receive, send if receive else None, group=ranks.world)
        return received

    return slowest_us(ranks, run, graph=graph)


def slowest_us(ranks: Ranks, run: Callable[[], Tensor], *, graph: bool) -> float:
    """Microseconds a call: the median over replays, of the rank that took longest."""
    on_gpu = ranks.device.type == "cuda"
    for _ in range(3):
        run()
    launches = LAUNCHES if on_gpu else 1
    captured = captured_graph(run) if on_gpu and graph else None
    repeated = captured.replay if captured else lambda: [run() for _ in range(launches)]
    times = []
    for _ in range(REPLAYS if on_gpu else 5):
        dist.barrier(ranks.world)
        times.append(elapsed_us(ranks.device, repeated))
    slowest = torch.tensor(statistics.median(times) / launches, device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.world)
    if captured:
        captured.reset()
    return float(slowest)


def captured_graph(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from a thread of its own, which a global capture would forbid.
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            run()
    captured.replay()
    torch.cuda.synchronize()
    return captured


def elapsed_us(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
