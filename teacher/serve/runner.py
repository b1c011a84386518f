"""One forward pass of a model over a step, and the cache that it reads and writes.

Shape legend: M rows, Z sampled rows, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teacher.serve.architecture import Architecture, DraftingArchitecture
from teacher.serve.block_manager import Copy
from teacher.serve.cache import CacheShape, PagedCache
from teacher.serve.decode_graph import DecodeGraphs
from teacher.serve.scheduler import Chunk
from teacher.serve.step import Step, build_step


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

    @torch.inference_mode()
    def run(self, chunks: list[Chunk[Any]], copies: list[Copy]) -> Tensor:
        """Make the copies of pages, then compute chunks that are `in_order` and put their entries into the cache.

        Returns logits behind each chunk that ends its sequence's text, and behind its draft, FP32 [Z, vocabulary].
        """
        self.cache.copy(copies)
        self._last = None
        if self._graphs is not None and self._graphs.fit(chunks):
            return self._graphs.run(chunks)
        step = build_step(chunks, self.model.device)
        self.cache.clear(step.num_pages)
        step = replace(step, decodes=[replace(group, plan=self.model.plan(group)) for group in step.decodes])
        x_MD = self.model.hidden(step, self._entries)
        self._last = step, x_MD
        return self.model.logits(x_MD[step.sampled])

    @torch.inference_mode()
    def draft(self, next_ids: list[int], rows: list[int]) -> Tensor:
        """Let the draft layers read what `run` has computed last, with the token that follows each of its rows.

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
