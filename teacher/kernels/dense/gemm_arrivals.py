"""Counters for programs that share a tile: the last to arrive at it adds up the parts and sets its counter to zero.

So a counter is zero before and after each launch, and no launch has to clear it: a memset costs a microsecond, a
seventh of a small product. Two launches that may run at the same time must not share counters:
- launches in one stream run one after another and share those of their stream;
- a launch that a CUDA graph captures has its own, since two graphs may be replayed at once wherever they were captured.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LEAST = 1_024  # counters of a stream
RESERVE = 1 << 20  # counters of a device's graphs, 4 MiB: never given back, as a graph may be replayed at any time


def arrival_counters(device: torch.device, num_tiles: int) -> Tensor:
    """Zeros, int32 of at least [num_tiles], for a launch in the current stream that leaves zeros behind."""
    return _of_device(device).take(num_tiles)


@cache
def _of_device(device: torch.device) -> _Counters:
    return _Counters(device)


class _Counters:
    """A device's counters: some for each stream, and a reserve for graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_stream: dict[int, Tensor] = {}
        self.reserve: Tensor | None = None
        self.taken = 0

    def take(self, num_tiles: int) -> Tensor:
        """Zeros for a launch in the current stream, int32 of at least [num_tiles]."""
        if self.device.type != "cuda":
            return self._of_stream(0, num_tiles)
        # A graph may be replayed beside anything: it shares counters with no stream and no other graph.
        if torch.cuda.is_current_stream_capturing():
            return self._of_graph(num_tiles)
        if self.reserve is None:
            self.reserve = self._zeros(RESERVE)
            torch.cuda.current_stream(self.device).synchronize()  # once: graphs are replayed in any stream
        return self._of_stream(torch.cuda.current_stream(self.device).cuda_stream, num_tiles)

    def _of_stream(self, stream: int, num_tiles: int) -> Tensor:
        counters = self.by_stream.get(stream)
        if counters is None or counters.numel() < num_tiles:
            counters = self.by_stream[stream] = self._zeros(max(LEAST, num_tiles))
        return counters

    def _of_graph(self, num_tiles: int) -> Tensor:
        begin, end = self.taken, self.taken + num_tiles
        if self.reserve is None or end > RESERVE:
            return self._zeros(num_tiles)  # cleared at each replay: slower, and as right
        self.taken = end
        return self.reserve[begin:end]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)
