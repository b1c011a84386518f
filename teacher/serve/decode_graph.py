"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not.

With drafts a sequence has two rows, and a second graph lets the draft layers read what the first one has computed. What
does not fit, a sequence that has no draft, is not graphed.

Shape legend: B sequences, padding included; M rows, one or two of each; Q pages a sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.serve.architecture import Architecture, DraftingArchitecture
from teacher.serve.scheduler import Chunk
from teacher.serve.step import Decodes, Step, with_expected

# Of padded batches: close together where a row of padding is a large part of the work.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_STEP_BEYOND = 64
_WARM_UP_RUNS = 2  # kernels compile and libraries claim their workspaces before anything is recorded


def padded(num_sequences: int) -> int:
    if num_sequences > _SIZES[-1]:
        return -(-num_sequences // _STEP_BEYOND) * _STEP_BEYOND
    return next(size for size in _SIZES if size >= num_sequences)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden_MD: Tensor
    logits: Tensor


class DecodeGraphs:
    """Of one model over one cache. All graphs share their inputs and one pool of memory.

    `draft_entries` are the draft layers' part of the cache; None: without drafts.
    """

    def __init__(
        self, model: Architecture, entries_LPSE: Tensor, max_sequences: int, draft_entries_LPSE: Tensor | None = None
    ) -> None:
        self._model = model
        self._entries_LPSE = entries_LPSE
        self._draft_entries_LPSE = draft_entries_LPSE
        self._num_queries = 1 if draft_entries_LPSE is None else 2
        most, device = padded(max_sequences), model.device
        num_pages = min(-(-model.max_positions // PAGE), entries_LPSE.shape[1])
        # Of every row token, position, slot and next token; of every sequence its length and the row to draft at.
        self._rows_4M = torch.zeros(4, most * self._num_queries, dtype=torch.int32, device=device)
        self._sequences_2B = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._pages_BQ = torch.zeros(most, num_pages, dtype=torch.int32, device=device)
        self._before_Z = torch.zeros(most * self._num_queries, dtype=torch.int64, device=device)
        self._graphs: dict[int, _Captured] = {}
        self._draft_graphs: dict[int, _Captured] = {}
        self._last = 0  # the size that was run last
        self._pool = torch.cuda.graph_pool_handle()

    def fit(self, chunks: list[Chunk[Any]]) -> bool:
        return all(chunk.count == 1 and chunk.num_rows == self._num_queries for chunk in chunks)

    def run(self, chunks: list[Chunk[Any]], before_Z: Tensor | None = None) -> Tensor:
        """Logits behind each row, FP32 [M, V]; they hold until the next run. `before` as `ModelRunner.run` takes it."""
        self._last = size = padded(len(chunks))
        self._put(chunks, size)
        if before_Z is not None:
            self._before_Z[: len(before_Z)] = before_Z
        if size not in self._graphs:
            self._graphs[size] = self._capture(lambda: self._compute(size))
        captured = self._graphs[size]
        captured.graph.replay()
        return captured.logits[: len(chunks) * self._num_queries]

    def draft(self, next_ids: list[int], rows: list[int]) -> Tensor:
        """Logits of what comes after `next_ids`, which follow the rows of the last run: FP32 [rows, V]."""
        size = self._last
        num_rows = size * self._num_queries
        host = torch.zeros(num_rows + size, dtype=torch.int32, pin_memory=True)
        numbers = host.numpy()
        numbers[: len(next_ids)] = next_ids
        numbers[num_rows : num_rows + len(rows)] = rows
        there = host.to(self._model.device, non_blocking=True)
        self._rows_4M[3, :num_rows] = there[:num_rows]
        self._sequences_2B[1, :size] = there[num_rows:]  # padding drafts at the first row, whatever it held before
        if size not in self._draft_graphs:
            self._draft_graphs[size] = self._capture(lambda: self._compute_draft(size))
        captured = self._draft_graphs[size]
        captured.graph.replay()
        return captured.logits[: len(rows)]

    def _put(self, chunks: list[Chunk[Any]], size: int) -> None:
        """Everything in one transfer."""
        widest = max(len(chunk.sequence.pages) for chunk in chunks)
        num_rows = size * self._num_queries
        host = torch.zeros(3 * num_rows + size + size * widest, dtype=torch.int32, pin_memory=True)
        parts = host.split((3 * num_rows, size, size * widest))
        rows, lengths = parts[0].view(3, num_rows).numpy(), parts[1].numpy()
        pages = parts[2].view(size, widest).numpy()
        tokens, positions, slots = [], [], []
        for number, chunk in enumerate(chunks):
            held = chunk.sequence.pages
            lengths[number] = chunk.end
            pages[number, : len(held)] = held
            tokens += chunk.token_ids
            for place in range(chunk.start, chunk.end):
                positions.append(place)
                slots.append(held[place // PAGE] * PAGE + place % PAGE)
        rows[:, : len(tokens)] = tokens, positions, slots
        rows[2, len(tokens) :] = -1
        there = host.to(self._model.device, non_blocking=True).split((3 * num_rows, size, size * widest))
        self._rows_4M[:3, :num_rows] = there[0].view(3, num_rows)
        self._sequences_2B[0, :size] = there[1]
        self._pages_BQ[:size, :widest] = there[2].view(size, widest)

    def _capture(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> _Captured:
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # what they write into the cache, the graph's run writes again
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            outputs = compute()
        return _Captured(graph, *outputs)

    def _compute(self, size: int) -> tuple[Tensor, Tensor]:
        hidden_MD = self._model.hidden(self._step(size), self._entries_LPSE)
        return hidden_MD, self._model.logits(hidden_MD)

    def _compute_draft(self, size: int) -> tuple[Tensor, Tensor]:
        assert isinstance(self._model, DraftingArchitecture)
        assert self._draft_entries_LPSE is not None
        next_ids_M = self._rows_4M[3, : size * self._num_queries].long()
        hidden_MD = self._graphs[size].hidden_MD
        drafted_MD = self._model.draft_hidden(hidden_MD, next_ids_M, self._step(size), self._draft_entries_LPSE)
        return drafted_MD, self._model.logits(drafted_MD[self._sequences_2B[1, :size].long()])

    def _step(self, size: int) -> Step:
        token_ids, positions, slots = self._rows_4M[:3, : size * self._num_queries]
        plan = self._model.plan_on_device(self._pages_BQ[:size], self._sequences_2B[0, :size], self._num_queries)
        return Step(
            token_ids_M=with_expected(token_ids.long(), self._before_Z),
            positions_M=positions.long(),
            slots_M=slots.long(),
            decodes=[Decodes([[]] * size, [0] * size, self._num_queries, plan)],
            chunks=[],
            sampled=torch.empty(0, device=self._model.device),
            num_pages=0,
        )
