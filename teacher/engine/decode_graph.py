"""Steps in which all sequences decode, as CUDA graphs: one launch instead of some twenty kernels a layer.

A graph is captured for each of a few numbers of sequences, the first time that one is needed, and serves any smaller
number with rows of padding: their length is zero, so they attend to nothing, and their slot is -1, so they are written
nowhere. Everything else that changes from step to step lies in tensors whose place does not (`graph_inputs`).

A graph ends with the logits, or goes on and samples the tokens (`graph_bodies`). With drafts a sequence has two rows; a
graph that samples then decides on the device which drafts came true, makes the next ones and leaves the rows of the
step after it where it found its own, so that this step can be launched before the host has heard how far the last one
came (`run_ahead`).

Prompts are graphs too, so that a step in which some are read while others decode is two or three launches, one behind
the other, and the host waits for none of them. Where the model can (`Architecture.reads_together`) pieces of many
prompts lie in the rows of one graph (`prompt_inputs`). Else a short prompt is a graph of its own, one sequence of many
rows, padded behind its end, where no row of its own looks; its pages are read in the absorbed form, whatever of them
was there before.

Two calls continue another one, and take the `GraphRun` that it returned: `draft` behind `logits`, `sample_on` behind
`step` or itself. They must be the next replay behind it, since graphs share their inputs and their memory
(`graph_pool`).

Shape legend: B sequences, padding included; M rows, T = one or two of each; D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.engine.architecture import Architecture
from teacher.engine.graph_bodies import End, GraphBodies
from teacher.engine.graph_inputs import GraphInputs
from teacher.engine.graph_pool import GraphPool
from teacher.engine.prompt_inputs import PromptShape
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE

# Sizes of padded batches: close together where a row of padding is a large part of the work.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_STEP_BEYOND = 64
_PROMPT_ROWS = (16, 32, 64, 128)
_MOST_ALONE = 4  # prompts of a step with a graph each


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


class _PromptKey(NamedTuple):
    shape: PromptShape
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
    """Graphs of one model over one cache, for steps of up to `max_sequences` that decode and `max_rows` in all.

    `draft_entries` are the draft layers' part of the cache; None: without drafts. With `one_pass` a step is one graph
    at the most, as drafts need it, and ranks whose passes are collective.
    """

    def __init__(
        self,
        model: Architecture,
        entries_LPSE: Tensor,
        max_sequences: int,
        draft_entries_LPSE: Tensor | None = None,
        *,
        max_rows: int,
        one_pass: bool,
    ) -> None:
        self._model = model
        self._num_queries = 1 if draft_entries_LPSE is None else 2
        self._one_pass = one_pass or self._num_queries > 1
        num_pages = min(-(-model.max_positions // PAGE), entries_LPSE.shape[1])
        self._inputs = GraphInputs(
            padded(max_sequences),
            self._num_queries,
            num_pages,
            _PROMPT_ROWS[-1],
            max_rows if model.reads_together else 0,
            model.device,
        )
        self._bodies = GraphBodies(model, self._inputs, entries_LPSE, draft_entries_LPSE)
        self._pool: GraphPool[_Key | _PromptKey] = GraphPool(self._inputs.carried, model.device)

    @property
    def num_captured(self) -> int:
        return len(self._pool)

    def fit(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether a graph of decoding sequences computes these."""
        drafts = self._num_queries > 1
        return all(chunk.count == 1 and chunk.ends_text and (chunk.draft is not None) == drafts for chunk in chunks)

    def fit_step(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether graphs compute these, which are in order, and draw all that is wanted of them."""
        if not self._may_sample(chunks):
            return False
        decodes, prompts = _apart(chunks)
        if not self.fit(decodes) or (self._one_pass and len(prompts) + bool(decodes) > 1):
            return False
        if any(chunk.scored for chunk in prompts):
            return False
        if prompts and self._inputs.prompts is not None:
            return self._inputs.prompts.shape_for(prompts) is not None
        return len(prompts) <= _MOST_ALONE and all(self._fits_alone(chunk) for chunk in prompts)

    def num_warm_ups(self, chunks: list[Chunk[Any]]) -> int:
        """Count the passes beside its own that a step of these takes, which is one graph: those before its capture."""
        decodes, prompts = _apart(chunks)
        if decodes:
            end = self._end_of(chunks) if self._may_sample(chunks) else End.LOGITS
            return self._pool.num_warm_ups(_Key(padded(len(chunks)), self._num_queries, end))
        num_rows = padded_prompt(prompts[0].count)
        assert num_rows is not None
        return self._pool.num_warm_ups(_Key(1, num_rows, self._end_of(chunks)))

    def step(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> tuple[Tensor, GraphRun | None]:
        """Compute chunks that `fit_step`, and sample: tokens behind those that end their text, int64, in their order.

        Where one graph did all of it, its run comes with them, and they hold until the next replay.
        """
        decodes, prompts = _apart(chunks)
        if not prompts:
            graph = self._sample(decodes, before_Z)
            return graph.rows, graph
        if self._one_pass:
            graph = self._read(prompts[0])
            return graph.rows, graph
        # Each replay may use the memory of the one before for its tokens: they are kept as soon as they are there.
        tokens = [self._sample(decodes, before_Z).rows.clone()] if decodes else []
        if self._inputs.prompts is not None:
            tokens.append(self._read_together(prompts))
        else:
            tokens += [self._read(chunk).rows.clone() for chunk in prompts]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0], None

    def warm_up(self, num_sequences: int) -> Iterator[int]:
        """Capture what steps that sample may need with up to so many sequences, the largest first, yielding how many
        graphs are left after each; for prompts that are read together too.

        Kernels are compiled on the way. What is computed is padding, so that nothing is written to the cache.
        """
        sizes = sorted({padded(number + 1) for number in range(num_sequences)}, reverse=True)
        prompts = self._inputs.prompts
        shapes = prompts.shapes[::-1] if prompts is not None else []
        left = len(sizes) + len(shapes)
        self._inputs.carried.lengths_B.zero_()
        for size in sizes:
            self._decode(size, End.SAMPLED, [0] * size)
            yield (left := left - 1)
        for shape in shapes:
            assert prompts is not None
            prompts.fill([], shape)
            self._replay_together(shape, End.SAMPLED)
            yield (left := left - 1)

    def logits(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> GraphRun:
        """Compute logits behind each row. `before` as `ModelRunner.forward` takes it."""
        return self._start(chunks, before_Z, End.LOGITS)

    def _sample(self, chunks: list[Chunk[Any]], before_Z: Tensor | None) -> GraphRun:
        """Sample a token behind each row, and, with drafts, guess at the one behind those that hold."""
        end = self._end_of(chunks)
        if end == End.SAMPLED:
            self._inputs.fill_sampling([chunk.sequence for chunk in chunks])
        return self._start(chunks, before_Z, end)

    def _read(self, chunk: Chunk[Any]) -> GraphRun:
        """Sample the token behind a prompt, and, with drafts, guess at the one behind that."""
        end, num_rows = self._end_of([chunk]), padded_prompt(chunk.count)
        assert num_rows is not None
        if end == End.SAMPLED:
            self._inputs.fill_sampling([chunk.sequence])
        self._inputs.fill_prompt(chunk, num_rows)
        num_pages = self._inputs.fill_pages([chunk.sequence])
        hidden_MD, out = self._pool.replay(_Key(1, num_rows, end), lambda: self._bodies.read(num_rows, end))
        return GraphRun(1, end, num_pages, hidden_MD, out[:1], None if self._num_queries == 1 else out[1:])

    def _read_together(self, chunks: list[Chunk[Any]]) -> Tensor:
        """Sample the token behind each prompt of these that ends; those are the first."""
        inputs, end = self._inputs.prompts, self._end_of(chunks)
        assert inputs is not None
        shape = inputs.shape_for(chunks)
        assert shape is not None
        if end == End.SAMPLED:
            self._inputs.fill_sampling([chunk.sequence for chunk in chunks], into=inputs.sampling_K8)
        inputs.fill(chunks, shape)
        return self._replay_together(shape, end)[: sum(chunk.ends_text for chunk in chunks)]

    def _replay_together(self, shape: PromptShape, end: End) -> Tensor:
        return self._pool.replay(_PromptKey(shape, end), lambda: self._bodies.read_together(shape, end)).out

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

    def _fits_alone(self, chunk: Chunk[Any]) -> bool:
        """Tell whether this is what is left of one short prompt."""
        num_rows = padded_prompt(chunk.count)
        places = min(self._inputs.num_pages * PAGE, self._model.max_positions)
        fits = num_rows is not None and chunk.start + num_rows <= places
        return fits and chunk.ends_text and self._model.reads_in_graphs

    def _may_sample(self, chunks: list[Chunk[Any]]) -> bool:
        """Tell whether graphs can say all that is wanted of these: the host has no say in tokens."""
        plain = all(chunk.sequence.is_plain for chunk in chunks)
        return plain and (self._num_queries == 1 or all(chunk.sequence.may_run_ahead for chunk in chunks))

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


def _apart(chunks: list[Chunk[Any]]) -> tuple[list[Chunk[Any]], list[Chunk[Any]]]:
    """Sequences that decode, which come first, and prompts."""
    num_decodes = next((number for number, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
    return chunks[:num_decodes], chunks[num_decodes:]
