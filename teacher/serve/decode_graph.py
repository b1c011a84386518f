"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not.

A graph ends with the logits, or goes on and draws the tokens. With drafts a sequence has two rows; a graph that draws
then decides on the device which drafts came true, makes the next ones and leaves the rows of the step after it where it
found its own, so that this step can be launched before the host has heard how far the last one came.

A short prompt that is read alone is a graph too, of one sequence with many rows. It is padded behind its end, where no
row of its own looks; its pages are read in the absorbed form, whatever of them was there before.

Shape legend: B sequences, padding included; M rows, T = one or two of each; Q pages a sequence, D hidden, V vocabulary.
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
from teacher.serve.sequence import Sequence
from teacher.serve.step import Decodes, Step, with_expected

# Of padded batches: close together where a row of padding is a large part of the work.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_STEP_BEYOND = 64
_PROMPT_ROWS = (16, 32, 64, 128)
_WARM_UP_RUNS = 2  # kernels compile and libraries claim their workspaces before anything is recorded


def padded_prompt(num_tokens: int) -> int | None:
    """Rows of the graph that reads so many tokens of a prompt; None: there is none."""
    return next((size for size in _PROMPT_ROWS if size >= num_tokens), None)


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
    """Of sequences in the order of their chunks, until the next run; int64. Without drafts `drafts` is None."""

    tokens_M: Tensor
    drafts_B: Tensor | None


class _Key(NamedTuple):
    num_sequences: int
    num_queries: int  # of each
    end: End


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph | None
    hidden_MD: Tensor
    out: Tensor  # logits, or tokens with drafts behind them


class _Columns(NamedTuple):
    """Of `DecodeGraphs._settings`: uniform numbers of the next tokens, and the cuts of `kernels.sample`.

    With drafts a step uses three of the numbers, of its two tokens and of the draft, and begins at the second of four
    where a token more than the host knew of has been written.
    """

    uniform: slice = slice(0, 4)
    top_p: slice = slice(4, 5)
    min_p: slice = slice(5, 6)
    top_k: slice = slice(6, 7)
    temperature: slice = slice(7, 8)


COLUMNS = _Columns()


class _Inputs(NamedTuple):
    """What changes from step to step, for the largest batch. A graph that drafts makes the next step's of its own.

    A sequence's `lengths` counts the rows of this step; `behind` is how many tokens were written since the host knew.
    """

    token_ids_BT: Tensor
    lengths_B: Tensor
    behind_B: Tensor


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
        self._on_gpu = device.type == "cuda"
        self._inputs = _Inputs(
            torch.zeros(most, self._num_queries, dtype=torch.int64, device=device),
            torch.zeros(most, dtype=torch.int32, device=device),
            torch.zeros(most, dtype=torch.int64, device=device),
        )
        self._settings_B8 = torch.ones(most, 8, dtype=torch.float64, device=device)
        self._pages_BQ = torch.zeros(most, num_pages, dtype=torch.int32, device=device)
        self._before_Z = torch.zeros(most * self._num_queries, dtype=torch.int64, device=device)
        # What `draft` is given: the token after each row, and the row to draft at.
        self._next_ids_M = torch.zeros(most * self._num_queries, dtype=torch.int64, device=device)
        self._draft_rows_B = torch.zeros(most, dtype=torch.int64, device=device)
        self._prompt_M = torch.zeros(_PROMPT_ROWS[-1], dtype=torch.int64, device=device)
        self._prompt_start, self._prompt_end = torch.zeros(2, 1, dtype=torch.int32, device=device)
        self._graphs: dict[_Key, _Captured] = {}
        self._last = 0, End.LOGITS  # the size and the end that were run last
        self._pages_put: list[int] = []  # the numbers of pages that are in place
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def fit(self, chunks: list[Chunk[Any]]) -> bool:
        return all(chunk.count == 1 and chunk.num_rows == self._num_queries for chunk in chunks)

    def fit_prompt(self, chunks: list[Chunk[Any]]) -> bool:
        """Whether this is what is left of one short prompt."""
        if len(chunks) != 1 or chunks[0].count == 1 or not chunks[0].ends_text or not self._model.reads_in_graphs:
            return False
        num_rows = padded_prompt(chunks[0].count)
        places = min(self._pages_BQ.shape[1] * PAGE, self._model.max_positions)
        return num_rows is not None and chunks[0].start + num_rows <= places

    def may_draw(self, chunks: list[Chunk[Any]]) -> bool:
        """Whether a graph can say all that is wanted of these, which fit one: the host has no say in their tokens."""
        plain = all(not (c.sequence.draw.logit_bias or c.sequence.draw.top_logprobs) for c in chunks)
        return plain and (self._num_queries == 1 or all(chunk.sequence.may_run_ahead for chunk in chunks))

    def num_warm_ups(self, chunks: list[Chunk[Any]]) -> int:
        """Passes beside its own that a step of these takes, which is a graph: those before it is captured."""
        if self.fit(chunks):
            end = self._end_of(chunks) if self.may_draw(chunks) else End.LOGITS
            key = _Key(padded(len(chunks)), self._num_queries, end)
        else:
            num_rows = padded_prompt(chunks[0].count)
            assert num_rows is not None
            key = _Key(1, num_rows, self._end_of(chunks))
        return 0 if key in self._graphs or not self._on_gpu else _WARM_UP_RUNS

    def logits(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> Tensor:
        """Behind each row, FP32 [M, V]; they hold until the next run. `before` as `ModelRunner.logits` takes it."""
        return self._run(chunks, before_Z, End.LOGITS)[: len(chunks) * self._num_queries]

    def draw(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> Drawn:
        """Tokens behind each row, and, with drafts, a guess at the one behind those that hold."""
        end = self._end_of(chunks)
        if end == End.DRAWN:
            self._put_settings([chunk.sequence for chunk in chunks])
        return self._drawn_of(self._run(chunks, before_Z, end), len(chunks))

    def read(self, chunk: Chunk[Any]) -> Drawn:
        """The token behind a prompt, and, with drafts, a guess at the one behind that."""
        end, num_rows = self._end_of([chunk]), padded_prompt(chunk.count)
        assert num_rows is not None
        self._last = 1, end
        if end == End.DRAWN:
            self._put_settings([chunk.sequence])
        host = self._on_host(num_rows + 2)
        host[: chunk.count] = torch.tensor(chunk.token_ids)
        host[num_rows], host[num_rows + 1] = chunk.start, chunk.end
        there = host.to(self._model.device, non_blocking=True)
        self._prompt_M[:num_rows], self._prompt_start[:], self._prompt_end[:] = there.split((num_rows, 1, 1))
        self._put_pages([chunk.sequence])
        out = self._replay(_Key(1, num_rows, end), lambda: self._read(num_rows, end))
        return Drawn(out[:1], None if self._num_queries == 1 else out[1:])

    def draw_on(self, sequences: list[Sequence[Any]]) -> Drawn:
        """The step after the last, which was drawn with drafts, of the same sequences in the same order.

        The host need not know yet what that one wrote; of pages a sequence must have as many as it may come to need.
        """
        size, end = self._last
        if [len(sequence.pages) for sequence in sequences] != self._pages_put:
            self._put_pages(sequences)
        if end == End.DRAWN:
            self._put_settings(sequences, known_ahead=1)
        return self._drawn_of(self._decode(size, end), len(sequences))

    def draft(self, next_ids: list[int], rows: list[int]) -> Tensor:
        """Logits of what comes after `next_ids`, which follow the rows of the last run: FP32 [rows, V]."""
        size, _ = self._last
        num_rows = size * self._num_queries
        host = self._on_host(num_rows + size)
        numbers = host.numpy()
        numbers[: len(next_ids)] = next_ids
        numbers[num_rows : num_rows + len(rows)] = rows  # padding drafts at the first row
        there = host.to(self._model.device, non_blocking=True)
        self._next_ids_M[:num_rows] = there[:num_rows]
        self._draft_rows_B[:size] = there[num_rows:]
        return self._decode(size, End.DRAFT)[: len(rows)]

    def _end_of(self, chunks: list[Chunk[Any]]) -> End:
        return End.GREEDY if all(chunk.sequence.draw.temperature == 0 for chunk in chunks) else End.DRAWN

    def _run(self, chunks: list[Chunk[Any]], before_Z: Tensor | None, end: End) -> Tensor:
        self._last = size, _ = padded(len(chunks)), end
        self._put(chunks, size)
        self._put_pages([chunk.sequence for chunk in chunks])
        if before_Z is not None:
            self._before_Z[: len(before_Z)] = before_Z
        return self._decode(size, end)

    def _put(self, chunks: list[Chunk[Any]], size: int) -> None:
        num_rows = size * self._num_queries
        host = self._on_host(num_rows + size)
        numbers = host.numpy()
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        numbers[: len(tokens)] = tokens
        numbers[num_rows : num_rows + len(chunks)] = [chunk.end for chunk in chunks]
        there = host.to(self._model.device, non_blocking=True)
        self._inputs.token_ids_BT[:size] = there[:num_rows].view(size, -1)
        self._inputs.lengths_B[:size] = there[num_rows:]
        if self._num_queries > 1:
            self._inputs.behind_B.zero_()

    def _put_pages(self, sequences: list[Sequence[Any]]) -> None:
        self._pages_put = [len(sequence.pages) for sequence in sequences]
        widest = max(self._pages_put)
        host = self._on_host(len(sequences) * widest).view(-1, widest)
        pages = host.numpy()
        for number, sequence in enumerate(sequences):
            pages[number, : len(sequence.pages)] = sequence.pages
        self._pages_BQ[: len(sequences), :widest] = host.to(self._model.device, non_blocking=True)

    def _put_settings(self, sequences: list[Sequence[Any]], known_ahead: int = 0) -> None:
        """`known_ahead` tokens of each are certain to be written by the step under way, beside those expected."""
        table = []
        num_uniform = 1 if self._num_queries == 1 else 4
        for sequence in sequences:
            settings, first = sequence.draw, sequence.num_expected + known_ahead
            uniform = [sequence.uniform(first + ahead) for ahead in range(num_uniform)]
            cuts = settings.top_p, settings.min_p, settings.top_k or torch.iinfo(torch.int32).max
            table.append([*uniform, *[0.0] * (4 - num_uniform), *cuts, settings.temperature])
        host = torch.tensor(table, dtype=torch.float64, pin_memory=self._on_gpu)
        self._settings_B8[: len(sequences)] = host.to(self._model.device, non_blocking=True)

    def _on_host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)

    def _drawn_of(self, out: Tensor, num_sequences: int) -> Drawn:
        num_rows = self._last[0] * self._num_queries
        drafts_B = None if self._num_queries == 1 else out[num_rows : num_rows + num_sequences]
        return Drawn(out[: num_sequences * self._num_queries], drafts_B)

    def _decode(self, size: int, end: End) -> Tensor:
        return self._replay(_Key(size, self._num_queries, end), lambda: self._compute(size, end))

    def _replay(self, key: _Key, compute: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        if not self._on_gpu:  # the same, launch by launch
            self._graphs[key] = _Captured(None, *compute())
        elif key not in self._graphs:
            self._graphs[key] = self._capture(compute)
        captured = self._graphs[key]
        if captured.graph is not None:
            captured.graph.replay()
        return captured.out

    def _capture(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> _Captured:
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            given = [tensor.clone() for tensor in self._inputs]
            for _ in range(_WARM_UP_RUNS):  # what they write into the cache, the graph's run writes again
                compute()
                for tensor, kept in zip(self._inputs, given, strict=True):
                    tensor.copy_(kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            outputs = compute()
        return _Captured(graph, *outputs)

    def _compute(self, size: int, end: End) -> tuple[Tensor, Tensor]:
        """Hidden states, and what the graph comes to."""
        token_ids_BT, lengths_B, behind_B = (tensor[:size] for tensor in self._inputs)
        token_ids_M = with_expected(token_ids_BT.flatten(), self._before_Z)
        step = self._step(token_ids_M, lengths_B, lengths_B, self._num_queries)
        if end == End.DRAFT:
            hidden_MD = self._graphs[_Key(size, self._num_queries, End.LOGITS)].hidden_MD
            next_ids_M, rows_B = self._next_ids_M[: size * self._num_queries], self._draft_rows_B[:size]
            return hidden_MD, self._draft_logits(step, hidden_MD, next_ids_M, rows_B)
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        logits_MV = self._model.logits(hidden_MD)
        if end == End.LOGITS:
            return hidden_MD, logits_MV
        uniform_BU = self._settings_B8[:size, COLUMNS.uniform]
        if self._num_queries == 1:
            return hidden_MD, self._drawn(logits_MV, uniform_BU[:, :1], size, end)
        numbers_B3 = behind_B[:, None] + torch.arange(3, device=uniform_BU.device)
        uniform_B3 = uniform_BU.gather(1, numbers_B3)
        tokens_M = self._drawn(logits_MV, uniform_B3[:, :2].reshape(-1, 1), size, end)
        came_true_B = tokens_M[::2] == step.token_ids_M[1::2]
        rows_B = 2 * torch.arange(size, device=tokens_M.device) + came_true_B
        draft_logits_BV = self._draft_logits(step, hidden_MD, tokens_M, rows_B)
        uniform_B1 = torch.where(came_true_B[:, None], uniform_B3[:, 2:], uniform_B3[:, 1:2])
        drafts_B = self._drawn(draft_logits_BV, uniform_B1, size, end)
        self._go_on(tokens_M[rows_B], drafts_B, came_true_B)
        return hidden_MD, torch.cat((tokens_M, drafts_B))

    def _read(self, num_rows: int, end: End) -> tuple[Tensor, Tensor]:
        token_ids_M, padded_end_B = self._prompt_M[:num_rows], self._prompt_start + num_rows
        step = self._step(token_ids_M, padded_end_B, self._prompt_end, num_rows)
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        last_B = (self._prompt_end - self._prompt_start - 1).long()
        uniform_BU = self._settings_B8[:1, COLUMNS.uniform]
        tokens_B = self._drawn(self._model.logits(hidden_MD[last_B]), uniform_BU[:, :1], 1, end)
        if self._num_queries == 1:
            return hidden_MD, tokens_B
        next_ids_M = token_ids_M.roll(-1).index_copy(0, last_B, tokens_B)
        draft_logits_BV = self._draft_logits(step, hidden_MD, next_ids_M, last_B)
        drafts_B = self._drawn(draft_logits_BV, uniform_BU[:, 1:2], 1, end)
        self._inputs.lengths_B[:1] = self._prompt_end + 1
        self._go_on(tokens_B, drafts_B, torch.zeros_like(tokens_B))
        return hidden_MD, torch.cat((tokens_B, drafts_B))

    def _go_on(self, last_B: Tensor, drafts_B: Tensor, came_true_B: Tensor) -> None:
        """Make the next step's inputs of what this one has found."""
        size = len(last_B)
        token_ids_BT, lengths_B, behind_B = (tensor[:size] for tensor in self._inputs)
        torch.stack((last_B, drafts_B), dim=1, out=token_ids_BT)
        lengths_B += (1 + came_true_B) * (lengths_B > 0)  # padding stays
        behind_B.copy_(came_true_B)

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
        settings_N8 = self._settings_B8[:size].repeat_interleave(len(logits_NV) // size, dim=0)
        temperature_N1 = settings_N8[:, COLUMNS.temperature]
        is_greedy_N1 = temperature_N1 == 0
        probabilities_NV = (logits_NV / torch.where(is_greedy_N1, 1.0, temperature_N1).float()).softmax(dim=-1)
        cuts = (settings_N8[:, column] for column in (COLUMNS.top_p, COLUMNS.min_p, COLUMNS.top_k))
        return torch.where(is_greedy_N1[:, 0], best_N, draw(probabilities_NV, Settings(uniform_N1, *cuts)))

    def _step(self, token_ids_M: Tensor, lengths_B: Tensor, ends_B: Tensor, num_queries: int) -> Step:
        """The last `num_queries` of so many tokens of each; those from `ends` on are padding."""
        size = len(lengths_B)
        pages_BQ = self._pages_BQ[:size]
        positions_BT = (lengths_B[:, None] + torch.arange(-num_queries, 0, device=lengths_B.device)).clamp(min=0)
        slots_BT = pages_BQ.gather(1, positions_BT // PAGE) * PAGE + positions_BT % PAGE
        plan = self._model.plan_on_device(pages_BQ, lengths_B, num_queries)
        return Step(
            token_ids_M=token_ids_M,
            positions_M=positions_BT.flatten(),
            slots_M=torch.where(positions_BT < ends_B[:, None], slots_BT, -1).flatten(),
            decodes=[Decodes([[]] * size, [0] * size, num_queries, plan)],
            chunks=[],
            sampled=torch.empty(0, device=self._model.device),
            num_pages=0,
        )
