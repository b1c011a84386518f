"""One forward pass of a model over a step, and the cache that it reads and writes.

Shape legend: M rows, Z sampled rows, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.serve.architecture import Architecture, DraftingArchitecture
from teacher.serve.block_manager import Copy
from teacher.serve.cache import CacheShape, PagedCache
from teacher.serve.decode_graph import DecodeGraphs
from teacher.serve.sampler import choose
from teacher.serve.scheduler import Chunk
from teacher.serve.sequence import Sequence
from teacher.serve.step import Step, build_step, with_expected


class Outcome(NamedTuple):
    """Of a step: tokens behind each row that asks for one, int64 [Z] on the model's device, until the next step.

    `logits` FP32 [Z, vocabulary] or `drafts` int64 [B], a guess for every sequence: what was not made is None.
    """

    tokens_Z: Tensor
    logits_ZV: Tensor | None
    drafts_B: Tensor | None


class ModelRunner:
    """On a GPU steps of up to `max_graphed` sequences, all of which decode, are CUDA graphs.

    With `drafts` the model's draft layers have their places in the cache behind its own.
    """

    def __init__(self, model: Architecture, num_pages: int, *, max_graphed: int = 0, drafts: bool = False) -> None:
        self.model = model
        shape = with_drafts(model) if drafts else model.cache_shape
        self.cache = PagedCache(shape, num_pages, model.dtype, model.device, extent=model.extent)
        num_layers = model.cache_shape.num_layers
        self._entries, self._draft_entries = self.cache.entries_LPSE.split((num_layers, shape.num_layers - num_layers))
        self._last: tuple[Step, Tensor] | None = None  # the step that was computed, and its hidden states
        self._graphs: DecodeGraphs | None = None
        if max_graphed and model.graphable:
            self._graphs = DecodeGraphs(model, self._entries, max_graphed, self._draft_entries if drafts else None)
            self.cache.clear(num_pages)  # padding may look at any page

    def num_warm_ups(self, chunks: list[Chunk[Any]]) -> int:
        """Passes that `run` would make of these before the one that counts."""
        graphs = self._graphs
        if graphs is None or not chunks:
            return 0
        is_graph = graphs.fit(chunks) or (graphs.fit_prompt(chunks) and graphs.may_draw(chunks))
        return graphs.num_warm_ups(chunks) if is_graph else 0

    @torch.inference_mode()
    def run(
        self, chunks: list[Chunk[Any]], copies: list[Copy], before_Z: Tensor | None = None, *, graphed: bool = True
    ) -> Outcome:
        """Make the copies of pages, then compute chunks that are `in_order` and put their entries into the cache.

        A token is drawn behind each chunk that ends its sequence's text, and behind its draft. `before` are the tokens
        that the step before has drawn, int64, to which expected ones refer (`Sequence.expect`).
        Only where `graphed` may this be a graph.
        """
        graphs = self._graphs if graphed else None
        if graphs is not None and graphs.may_draw(chunks):
            decodes = graphs.fit(chunks)
            if decodes or graphs.fit_prompt(chunks):
                self.cache.copy(copies)
                drawn = graphs.draw(chunks, before_Z) if decodes else graphs.read(chunks[0])
                return Outcome(drawn.tokens_M, None, drawn.drafts_B)
        logits_ZV = self.logits(chunks, copies, before_Z, graphed)
        places = [(chunk.sequence, ahead) for chunk in chunks for ahead in range(chunk.num_sampled)]
        uniform = [sequence.uniform(ahead + sequence.num_expected) for sequence, ahead in places]
        return Outcome(choose(logits_ZV, uniform, [sequence.draw for sequence, _ in places]), logits_ZV, None)

    @torch.inference_mode()
    def run_on(self, sequences: list[Sequence[Any]], copies: list[Copy]) -> Outcome:
        """The step after one that has made its drafts itself, of the same sequences, before the host knows its tokens.

        Their pages must have room for whatever it has written, and for two tokens more.
        """
        assert self._graphs is not None
        self.cache.copy(copies)
        drawn = self._graphs.draw_on(sequences)
        return Outcome(drawn.tokens_M, None, drawn.drafts_B)

    @torch.inference_mode()
    def logits(
        self, chunks: list[Chunk[Any]], copies: list[Copy], before_Z: Tensor | None = None, graphed: bool = True
    ) -> Tensor:
        """`run` without drawing: what there is to draw from, FP32 [Z, vocabulary]."""
        self.cache.copy(copies)
        self._last = None
        if self._graphs is not None and graphed and self._graphs.fit(chunks):
            return self._graphs.logits(chunks, before_Z)
        step = build_step(chunks, self.model.device)
        if before_Z is not None and len(before_Z):
            step = replace(step, token_ids_M=with_expected(step.token_ids_M, before_Z))
        self.cache.clear(step.num_pages)
        step = replace(step, decodes=[replace(group, plan=self.model.plan(group)) for group in step.decodes])
        x_MD = self.model.hidden(step, self._entries)
        self._last = step, x_MD
        return self.model.logits(x_MD[step.sampled])

    @torch.inference_mode()
    def draft(self, next_ids: list[int], rows: list[int]) -> Tensor:
        """Let the draft layers read what `logits` has computed last, with the token that follows each of its rows.

        Returns logits of the token after that behind some `rows`, FP32 [rows, vocabulary].
        """
        assert isinstance(self.model, DraftingArchitecture)
        if self._last is None:
            assert self._graphs is not None
            return self._graphs.draft(next_ids, rows)
        step, x_MD = self._last
        next_ids_M = torch.tensor(next_ids, device=x_MD.device)
        drafted_MD = self.model.draft_hidden(x_MD, next_ids_M, step, self._draft_entries)
        return self.model.logits(drafted_MD[torch.tensor(rows, dtype=torch.long, device=x_MD.device)])


def with_drafts(model: Architecture) -> CacheShape:
    """What the cache keeps of a token where the model drafts. Raises ValueError for one that does not."""
    if not isinstance(model, DraftingArchitecture) or not model.num_draft_layers:
        raise ValueError("speculation needs a model with a multi-token prediction (MTP) layer; this one has none")
    return model.cache_shape._replace(num_layers=model.cache_shape.num_layers + model.num_draft_layers)
