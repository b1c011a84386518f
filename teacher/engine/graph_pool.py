"""Capture and replay: CUDA graphs by key, in one pool of memory.

All graphs of a pool may use the same memory for what they compute, as only one runs at a time: an output holds until
the next replay of any of them. On a CPU nothing is recorded, and every replay computes launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from teacher.engine.graph_inputs import CarriedInputs

WARM_UP_RUNS = 2  # kernels compile and libraries claim their workspaces before anything is recorded

GraphKey = TypeVar("GraphKey", bound=Hashable)


class GraphOutput(NamedTuple):
    """Outputs of a body: hidden states, and logits or tokens with drafts behind them."""

    hidden_MD: Tensor
    out: Tensor


class _CapturedGraph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    output: GraphOutput


class GraphPool(Generic[GraphKey]):
    """`carried` are the inputs that bodies write: a capture, which computes thrice, must leave them as found."""

    def __init__(self, carried: CarriedInputs, device: torch.device) -> None:
        self._carried = carried
        self._device = device
        self._graphs: dict[GraphKey, _CapturedGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def num_warm_ups(self, key: GraphKey) -> int:
        """Count the passes that a replay would make before the one that counts: those of a capture."""
        return 0 if key in self._graphs or self._device.type != "cuda" else WARM_UP_RUNS

    def replay(self, key: GraphKey, compute: Callable[[], GraphOutput]) -> GraphOutput:
        """Compute what `compute` does by a graph of it, which is captured the first time that its key is met."""
        if self._device.type != "cuda":  # the same, launch by launch
            return compute()
        if key not in self._graphs:
            self._graphs[key] = self._capture(compute)
        captured = self._graphs[key]
        captured.graph.replay()
        return captured.output

    def _capture(self, compute: Callable[[], GraphOutput]) -> _CapturedGraph:
        # Capture must not see work of other streams: it has a stream of its own, behind all that was launched before.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            given = [tensor.clone() for tensor in self._carried]
            for _ in range(WARM_UP_RUNS):  # what they write into the cache, the graph's run writes again
                compute()
                for tensor, kept in zip(self._carried, given, strict=True):
                    tensor.copy_(kept)
        torch.cuda.current_stream().wait_stream(stream)
        # While capturing nothing is computed, so the inputs still stand for the replay that follows.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=stream):
            output = compute()
        return _CapturedGraph(graph, output)
