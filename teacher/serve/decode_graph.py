"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not.

Shape legend: B sequences, padding included; Q pages a sequence.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.serve.architecture import Architecture
from teacher.serve.scheduler import Chunk
from teacher.serve.step import Decodes, Step

# Of padded batches: close together where a row of padding is a large part of the work.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_STEP_BEYOND = 64
_WARM_UP_RUNS = 2  # kernels compile and libraries claim their workspaces before anything is recorded


def padded(num_sequences: int) -> int:
    if num_sequences > _SIZES[-1]:
        return -(-num_sequences // _STEP_BEYOND) * _STEP_BEYOND
    return next(size for size in _SIZES if size >= num_sequences)


class DecodeGraphs:
    """Of one model over one cache. All graphs share their inputs and one pool of memory."""

    def __init__(self, model: Architecture, entries_LPSE: Tensor, max_sequences: int) -> None:
        self._model = model
        self._entries_LPSE = entries_LPSE
        most, device = padded(max_sequences), model.device
        num_pages = min(-(-model.max_positions // PAGE), entries_LPSE.shape[1])
        # Rows of `numbers`: token, position, slot, length.
        self._numbers_4B = torch.zeros(4, most, dtype=torch.int32, device=device)
        self._pages_BQ = torch.zeros(most, num_pages, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, chunks: list[Chunk[Any]]) -> Tensor:
        """Logits of a token each, FP32 [sequences, vocabulary]; they hold until the next run."""
        size = padded(len(chunks))
        self._put(chunks, size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits_BV = self._graphs[size]
        graph.replay()
        return logits_BV[: len(chunks)]

    def _put(self, chunks: list[Chunk[Any]], size: int) -> None:
        """Everything in one transfer."""
        widest = max(len(chunk.sequence.pages) for chunk in chunks)
        host = torch.zeros(4 * size + size * widest, dtype=torch.int32, pin_memory=True)
        numbers = host[: 4 * size].view(4, size).numpy()
        pages = host[4 * size :].view(size, widest).numpy()
        numbers[2] = -1
        for row, chunk in enumerate(chunks):
            sequence, place = chunk.sequence, chunk.sequence.num_computed
            slot = sequence.pages[place // PAGE] * PAGE + place % PAGE
            numbers[:, row] = *sequence.tokens(place, place + 1), place, slot, place + 1
            pages[row, : len(sequence.pages)] = numpy.asarray(sequence.pages, dtype=numpy.int32)
        there = host.to(self._model.device, non_blocking=True)
        self._numbers_4B[:, :size] = there[: 4 * size].view(4, size)
        self._pages_BQ[:size, :widest] = there[4 * size :].view(size, widest)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # what they write into the cache, the graph's run writes again
                self._compute(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits_BV = self._compute(size)
        return graph, logits_BV

    def _compute(self, size: int) -> Tensor:
        token_ids, positions, slots, lengths = self._numbers_4B[:, :size]
        step = Step(
            token_ids_M=token_ids.long(),
            positions_M=positions.long(),
            slots_M=slots.long(),
            decodes=Decodes([[]] * size, [0] * size),
            chunks=[],
            sampled=torch.empty(0, device=self._model.device),
            num_pages=0,
            plan=self._model.plan_on_device(self._pages_BQ[:size], lengths),
        )
        return self._model.logits(self._model.hidden(step, self._entries_LPSE))
