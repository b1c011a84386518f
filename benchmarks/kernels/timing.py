"""Time of a call: on a GPU the median replay of a CUDA graph, elsewhere the median on the clock.

A graph holds launches over as many input sets as outsize the L2 cache twice, so that what a launch reads comes from
memory, as it does between two layers of a model. Outputs stay alive until the graph is captured: each launch has its
own, and writes to lines that are not in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.utils.deterministic

Inputs = TypeVar("Inputs")
MOST_SETS = 256  # of inputs: tiny ones (a token's logits) do not outsize a cache
LEAST_LAUNCHES = 8  # in a graph, where its end would show in the mean
REPLAYS = (5, 25)  # fewest and most
BUDGET_S = 0.1  # of replays, beyond the fewest


def microseconds(run: Callable[[Inputs], object], sets: Sequence[Inputs], device: torch.device) -> float:
    """Microseconds a call, over `sets` in turn."""
    if device.type == "cuda":
        return _replayed(run, sets)
    run(sets[0])
    seconds = []
    for inputs in sets:
        started = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds)


def _replayed(run: Callable[[Inputs], object], sets: Sequence[Inputs]) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for inputs in sets[:2]:  # compiles, and lets libraries set up their workspaces
            run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    passes = -(-LEAST_LAUNCHES // len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(inputs) for _ in range(passes) for inputs in sets]
    launches = len(outputs)
    del outputs
    graph.replay()
    fewest, most = REPLAYS
    times: list[float] = []
    while len(times) < fewest or (len(times) < most and sum(times) < 1e3 * BUDGET_S):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    graph.reset()
    return 1e3 * statistics.median(times) / launches


def num_sets(bytes_a_set: int, device: torch.device, *, least: int) -> int:
    """Input sets that outsize the L2 twice."""
    if device.type != "cuda":
        return least
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(least, min(MOST_SETS, -(-2 * cache // max(1, bytes_a_set))))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, `torch.empty` gives NaN (or the largest integer): what a kernel does not write shows in its result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
