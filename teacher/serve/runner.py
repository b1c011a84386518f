"""One forward pass of a model over a step, and the cache that it reads and writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teacher.serve.architecture import Architecture
from teacher.serve.block_manager import Copy
from teacher.serve.cache import PagedCache
from teacher.serve.decode_graph import DecodeGraphs
from teacher.serve.scheduler import Chunk
from teacher.serve.step import build_step


class ModelRunner:
    """On a GPU steps of up to `max_graphed` sequences, all of which decode, are CUDA graphs."""

    def __init__(self, model: Architecture, num_pages: int, *, max_graphed: int = 0) -> None:
        self.model = model
        self.cache = PagedCache(model.cache_shape, num_pages, model.dtype, model.device, extent=model.extent)
        self._graphs: DecodeGraphs | None = None
        if max_graphed and model.graphable:
            self._graphs = DecodeGraphs(model, self.cache.entries_LPSE, max_graphed)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk[Any]], copies: list[Copy]) -> Tensor:
        """Make the copies of pages, then compute chunks that are `in_order` and put their entries into the cache.

        Returns logits after each chunk that ends its sequence's text, FP32 [sampled rows, vocabulary].
        """
        self.cache.copy(copies)
        if self._graphs is not None and all(chunk.count == 1 for chunk in chunks):
            return self._graphs.run(chunks)
        step = build_step(chunks, self.model.device)
        self.cache.clear(step.num_pages)
        if len(step.decodes):
            step = replace(step, plan=self.model.plan(step.decodes))
        x_MD = self.model.hidden(step, self.cache.entries_LPSE)
        return self.model.logits(x_MD[step.sampled])
