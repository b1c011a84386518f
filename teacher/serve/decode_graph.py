"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not.

A graph ends with the logits, or goes on and draws the tokens. With drafts a sequence has two rows; a graph that draws
then decides on the device which drafts came true and makes the next ones, so that a step is one launch and one answer.

Shape legend: B sequences, padding included; M rows, one or two of each; Q pages a sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.kernels.sample import Settings, draw
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


class End(StrEnum):
    """What a graph comes to."""

    LOGITS = "logits"
    GREEDY = "greedy"  # tokens, all of temperature zero
    DRAWN = "drawn"  # tokens, each by its sequence's settings
    DRAFT = "draft"  # logits of the draft layers, over what a graph that ended in logits has computed


class Drawn(NamedTuple):
    """Of sequences in the order of their chunks; int64. Without drafts `drafts` is None."""

    tokens_M: Tensor
    drafts_B: Tensor | None


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden_MD: Tensor
    out: Tensor  # logits, or tokens with drafts behind them


class _Columns(NamedTuple):
    """Of `DecodeGraphs._settings`: the uniform numbers of the next three tokens, and the cuts of `kernels.sample`."""

    uniform: slice = slice(0, 3)
    top_p: slice = slice(3, 4)
    min_p: slice = slice(4, 5)
    top_k: slice = slice(5, 6)
    temperature: slice = slice(6, 7)


COLUMNS = _Columns()


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
        self._settings_B7 = torch.ones(most, 7, dtype=torch.float64, device=device)
        self._pages_BQ = torch.zeros(most, num_pages, dtype=torch.int32, device=device)
        self._before_Z = torch.zeros(most * self._num_queries, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, End], _Captured] = {}
        self._last = 0  # the size that was run last
        self._pool = torch.cuda.graph_pool_handle()

    def fit(self, chunks: list[Chunk[Any]]) -> bool:
        return all(chunk.count == 1 and chunk.num_rows == self._num_queries for chunk in chunks)

    def may_draw(self, chunks: list[Chunk[Any]]) -> bool:
        """Whether a graph can say all that is wanted of these, which `fit`: the host has no say in their tokens."""
        plain = all(not (c.sequence.draw.logit_bias or c.sequence.draw.top_logprobs) for c in chunks)
        return plain and (self._num_queries == 1 or all(chunk.sequence.may_run_ahead for chunk in chunks))

    def logits(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> Tensor:
        """Behind each row, FP32 [M, V]; they hold until the next run. `before` as `ModelRunner.logits` takes it."""
        return self._run(chunks, before_Z, End.LOGITS)[: len(chunks) * self._num_queries]

    def draw(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> Drawn:
        """Tokens behind each row, and, with drafts, a guess at the one behind those that hold."""
        end = End.GREEDY if all(chunk.sequence.draw.temperature == 0 for chunk in chunks) else End.DRAWN
        if end == End.DRAWN:
            self._put_settings(chunks)
        out = self._run(chunks, before_Z, end).clone()  # the next run writes over it
        num_rows = self._last * self._num_queries
        drafts_B = None if self._num_queries == 1 else out[num_rows : num_rows + len(chunks)]
        return Drawn(out[: len(chunks) * self._num_queries], drafts_B)

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
        return self._replay(size, End.DRAFT)[: len(rows)]

    def _run(self, chunks: list[Chunk[Any]], before_Z: Tensor | None, end: End) -> Tensor:
        self._last = size = padded(len(chunks))
        self._put(chunks, size)
        if before_Z is not None:
            self._before_Z[: len(before_Z)] = before_Z
        return self._replay(size, end)

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

    def _put_settings(self, chunks: list[Chunk[Any]]) -> None:
        table = []
        for chunk in chunks:
            sequence, settings = chunk.sequence, chunk.sequence.draw
            uniform = [sequence.uniform(sequence.num_expected + ahead) for ahead in range(2 * self._num_queries - 1)]
            cuts = settings.top_p, settings.min_p, settings.top_k or torch.iinfo(torch.int32).max
            table.append([*uniform, *[0.0] * (3 - len(uniform)), *cuts, settings.temperature])
        host = torch.tensor(table, dtype=torch.float64).pin_memory()
        self._settings_B7[: len(chunks)] = host.to(self._model.device, non_blocking=True)

    def _replay(self, size: int, end: End) -> Tensor:
        if (size, end) not in self._graphs:
            self._graphs[size, end] = self._capture(lambda: self._compute(size, end))
        captured = self._graphs[size, end]
        captured.graph.replay()
        return captured.out

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

    def _compute(self, size: int, end: End) -> tuple[Tensor, Tensor]:
        """Hidden states, and what the graph comes to."""
        step = self._step(size)
        if end == End.DRAFT:
            next_ids_M = self._rows_4M[3, : size * self._num_queries].long()
            hidden_MD = self._graphs[size, End.LOGITS].hidden_MD
            return hidden_MD, self._draft_logits(step, hidden_MD, next_ids_M, self._sequences_2B[1, :size].long())
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        logits_MV = self._model.logits(hidden_MD)
        if end == End.LOGITS:
            return hidden_MD, logits_MV
        uniform_B3 = self._settings_B7[:size, COLUMNS.uniform]
        tokens_M = self._drawn(logits_MV, uniform_B3[:, : self._num_queries].reshape(-1, 1), size, end)
        if self._num_queries == 1:
            return hidden_MD, tokens_M
        came_true_B = tokens_M[::2] == step.token_ids_M[1::2]
        rows_B = 2 * torch.arange(size, device=tokens_M.device) + came_true_B
        draft_logits_BV = self._draft_logits(step, hidden_MD, tokens_M, rows_B)
        uniform_B1 = torch.where(came_true_B[:, None], uniform_B3[:, 2:], uniform_B3[:, 1:2])
        return hidden_MD, torch.cat((tokens_M, self._drawn(draft_logits_BV, uniform_B1, size, end)))

    def _draft_logits(self, step: Step, hidden_MD: Tensor, next_ids_M: Tensor, rows_B: Tensor) -> Tensor:
        assert isinstance(self._model, DraftingArchitecture)
        assert self._draft_entries_LPSE is not None
        drafted_MD = self._model.draft_hidden(hidden_MD, next_ids_M, step, self._draft_entries_LPSE)
        return self._model.logits(drafted_MD[rows_B])

    def _drawn(self, logits_NV: Tensor, uniform_N1: Tensor, size: int, end: End) -> Tensor:
        """`sampler.choose` for one or two rows of each sequence, where nobody looks at the settings' numbers."""
        best_N = logits_NV.argmax(dim=-1)
        if end == End.GREEDY:
            return best_N
        settings_N7 = self._settings_B7[:size].repeat_interleave(len(logits_NV) // size, dim=0)
        temperature_N1 = settings_N7[:, COLUMNS.temperature]
        is_greedy_N1 = temperature_N1 == 0
        probabilities_NV = (logits_NV / torch.where(is_greedy_N1, 1.0, temperature_N1).float()).softmax(dim=-1)
        cuts = (settings_N7[:, column] for column in (COLUMNS.top_p, COLUMNS.min_p, COLUMNS.top_k))
        return torch.where(is_greedy_N1[:, 0], best_N, draw(probabilities_NV, Settings(uniform_N1, *cuts)))

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
