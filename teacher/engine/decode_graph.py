"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not (`graph_inputs`).

A graph ends with the logits, or goes on and samples the tokens (`graph_bodies`). With drafts a sequence has two rows; a
graph that samples then decides on the device which drafts came true, makes the next ones and leaves the rows of the
step after it where it found its own, so that this step can be launched before the host has heard how far the last one
came (`run_ahead`).

A short prompt that is read alone is a graph too, of one sequence with many rows. It is padded behind its end, where no
row of its own looks; its pages are read in the absorbed form, whatever of them was there before.

Two calls continue another one, and take the `GraphRun` that it returned: `draft` behind `logits`, `sample_on` behind
`sample`, `read` or itself. They must be the next replay behind it, since graphs share their inputs and their memory
(`graph_pool`).

Shape legend: B sequences, padding included; M rows, T = one or two of each; D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from teacher.engine.architecture import Architecture
from teacher.engine.graph_bodies import End, GraphBodies
from teacher.engine.graph_inputs import GraphInputs
from teacher.engine.graph_pool import GraphPool
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE

# Sizes of padded batches: close together where a row of padding is a large part of the work.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_STEP_BEYOND = 64
_PROMPT_ROWS = (16, 32, 64, 128)


def padded_prompt(num_tokens: int) -> int | None:
    """Rows of the graph that reads so many tokens of a prompt; None: there is none."""
    return next((size for size in _PROMPT_ROWS if size >= num_tokens), None)


def padded(num_sequences: int) -> int:
    """Sequences of the graph that serves so many."""
    if num_sequences > _SIZES[-1]:
        return -(-num_sequences // _STEP_BEYOND) * _STEP_BEYOND
    return next(size for size in _SIZES if size >= num_sequences)


class _Key(NamedTuple):
    size: int  # sequences, padding included
    num_queries: int  # of each
    end: End


class GraphRun(NamedTuple):
    """A graph that was replayed last: what it computed, and what a call that continues it must know.

    `rows` are, without padding, logits FP32 [M, V] or tokens int64 [M]; `drafts` int64, one a sequence, or None.
    `num_pages` says how many pages of each sequence the device's tables hold. All holds until the next replay.
    """

    size: int
    end: End
    num_pages: list[int]
    hidden_MD: Tensor
    rows: Tensor
    drafts_B: Tensor | None


class DecodeGraphs:
    """Graphs of one model over one cache.

    `draft_entries` are the draft layers' part of the cache; None: without drafts.
    """

    def __init__(
        self, model: Architecture, entries_LPSE: Tensor, max_sequences: int, draft_entries_LPSE: Tensor | None = None
    ) -> None:
        self._model = model
        self._num_queries = 1 if draft_entries_LPSE is None else 2
        num_pages = min(-(-model.max_positions // PAGE), entries_LPSE.shape[1])
        self._inputs = GraphInputs(padded(max_sequences), self._num_queries, num_pages, _PROMPT_ROWS[-1], model.device)
        self._bodies = GraphBodies(model, self._inputs, entries_LPSE, draft_entries_LPSE)
        self._pool: GraphPool[_Key] = GraphPool(self._inputs.carried, model.device)

    @property
    def num_captured(self) -> int:
        return len(self._pool)

    def fit(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether a graph of decoding sequences computes these."""
        return all(
            chunk.count == 1 and chunk.num_rows == self._num_queries and (chunk.ends_text or not chunk.scored)
            for chunk in chunks
        )

    def fit_prompt(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether this is what is left of one short prompt."""
        if len(chunks) != 1 or chunks[0].count == 1 or not chunks[0].ends_text or not self._model.reads_in_graphs:
            return False
        if chunks[0].scored:
            return False
        num_rows = padded_prompt(chunks[0].count)
        places = min(self._inputs.num_pages * PAGE, self._model.max_positions)
        return num_rows is not None and chunks[0].start + num_rows <= places

    def may_sample(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether a graph can say all that is wanted of these, which fit one: the host has no say in tokens."""
        plain = all(chunk.sequence.is_plain for chunk in chunks)
        return plain and (self._num_queries == 1 or all(chunk.sequence.may_run_ahead for chunk in chunks))

    def num_warm_ups(self, chunks: list[Chunk[Any]]) -> int:
        """Count the passes beside its own that a step of these takes, which is a graph: those before its capture."""
        if self.fit(chunks):
            end = self._end_of(chunks) if self.may_sample(chunks) else End.LOGITS
            key = _Key(padded(len(chunks)), self._num_queries, end)
        else:
            num_rows = padded_prompt(chunks[0].count)
            assert num_rows is not None
            key = _Key(1, num_rows, self._end_of(chunks))
        return self._pool.num_warm_ups(key)

    def logits(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> GraphRun:
        """Compute logits behind each row. `before` as `ModelRunner.forward` takes it."""
        return self._start(chunks, before_Z, End.LOGITS)

    def sample(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> GraphRun:
        """Sample a token behind each row, and, with drafts, guess at the one behind those that hold."""
        end = self._end_of(chunks)
        if end == End.SAMPLED:
            self._inputs.fill_sampling([chunk.sequence for chunk in chunks])
        return self._start(chunks, before_Z, end)

    def read(self, chunk: Chunk[Any]) -> GraphRun:
        """Sample the token behind a prompt, and, with drafts, guess at the one behind that."""
        end, num_rows = self._end_of([chunk]), padded_prompt(chunk.count)
        assert num_rows is not None
        if end == End.SAMPLED:
            self._inputs.fill_sampling([chunk.sequence])
        self._inputs.fill_prompt(chunk, num_rows)
        num_pages = self._inputs.fill_pages([chunk.sequence])
        hidden_MD, out = self._pool.replay(_Key(1, num_rows, end), lambda: self._bodies.read(num_rows, end))
        return GraphRun(1, end, num_pages, hidden_MD, out[:1], None if self._num_queries == 1 else out[1:])

    def sample_on(self, before: GraphRun, sequences: list[Sequence[Any]]) -> GraphRun:
        """Compute the step behind `before`, which sampled with drafts, of the same sequences in the same order.

        The host need not know yet what that one wrote: it left this one's tokens and lengths in place. Pages a sequence
        must have as many as it may come to need; they are sent only where some have been added.
        """
        num_pages = [len(sequence.pages) for sequence in sequences]
        if num_pages != before.num_pages:
            self._inputs.fill_pages(sequences)
        if before.end == End.SAMPLED:
            self._inputs.fill_sampling(sequences, known_ahead=1)
        return self._decode(before.size, before.end, num_pages)

    def draft(self, before: GraphRun, next_ids: list[int], rows: list[int]) -> Tensor:
        """Logits of what comes after `next_ids`, which follow the rows of `before`, at some `rows`: FP32 [rows, V]."""
        size = before.size
        self._inputs.fill_draft_rows(next_ids, rows, size)
        key = _Key(size, self._num_queries, End.DRAFT)
        return self._pool.replay(key, lambda: self._bodies.draft(size, before.hidden_MD)).out[: len(rows)]

    def _end_of(self, chunks: list[Chunk[Any]]) -> End:
        return End.GREEDY if all(chunk.sequence.sampling_params.temperature == 0 for chunk in chunks) else End.SAMPLED

    def _start(self, chunks: list[Chunk[Any]], before_Z: Tensor | None, end: End) -> GraphRun:
        size = padded(len(chunks))
        self._inputs.fill_rows(chunks, size)
        num_pages = self._inputs.fill_pages([chunk.sequence for chunk in chunks])
        if before_Z is not None:
            self._inputs.fill_before(before_Z)
        return self._decode(size, end, num_pages)

    def _decode(self, size: int, end: End, num_pages: list[int]) -> GraphRun:
        key = _Key(size, self._num_queries, end)
        hidden_MD, out = self._pool.replay(key, lambda: self._bodies.decode(size, end))
        num_sequences, num_rows = len(num_pages), size * self._num_queries
        has_drafts = self._num_queries > 1 and end != End.LOGITS
        drafts_B = out[num_rows : num_rows + num_sequences] if has_drafts else None
        return GraphRun(size, end, num_pages, hidden_MD, out[: num_sequences * self._num_queries], drafts_B)
