"""One forward pass of a model over a step, and the cache that it reads and writes.

Shape legend: M rows, Z sampled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.engine.architecture import Architecture, DraftingArchitecture
from teacher.engine.block_manager import Copy
from teacher.engine.cache import CacheShape, PagedCache
from teacher.engine.decode_graph import DecodeGraphs, GraphRun
from teacher.engine.placeholders import resolve_placeholders
from teacher.engine.sampler import choose, masked, score
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.engine.step import Step, build_step

# Rows of logits that are there at once while prompts are scored: 77 MB, some three times, of 150,000 tokens.
SCORED_ROWS = 128


class ForwardPass(NamedTuple):
    """Logits to sample from, FP32 [Z, V], and the hidden states that draft layers read: of a step, or in a graph.

    Those of a graph hold until the next step. `hidden` is None where the model does not draft.
    """

    logits_ZV: Tensor
    hidden: tuple[Step, Tensor] | GraphRun | None


class SampledTokens(NamedTuple):
    """A token behind each row of a step that asks for one, int64 [Z] on the model's device, until the next step.

    A step ends in one of two ways. Either the host samples from a forward pass, and drafts from it later, or a graph
    has sampled, and has made its `drafts` itself, int64 [B], one for every sequence; None: it makes none.
    """

    tokens_Z: Tensor
    drafts_B: Tensor | None = None
    forward: ForwardPass | None = None
    graph: GraphRun | None = None


class ModelRunner:
    """A model and its cache. On a GPU steps of up to `max_graphed` sequences and `max_rows` tokens are CUDA graphs.

    With `one_pass` a step is never two passes over the model, one for who decodes and one for prompts. With `drafts`
    the model's draft layers have their places in the cache behind its own.
    """

    def __init__(
        self,
        model: Architecture,
        num_pages: int,
        *,
        max_graphed: int = 0,
        max_rows: int = 4096,
        drafts: bool = False,
        one_pass: bool = False,
    ) -> None:
        self.model = model
        shape = with_drafts(model) if drafts else model.cache_shape
        self.cache = PagedCache(shape, num_pages, model.dtype, model.device, extent=model.extent)
        self._drafts = drafts
        num_layers = model.cache_shape.num_layers
        self._entries, self._draft_entries = self.cache.entries_LPSE.split((num_layers, shape.num_layers - num_layers))
        self.graphs: DecodeGraphs | None = None
        if max_graphed and model.graphable:
            draft_entries = self._draft_entries if drafts else None
            sizes: dict[str, Any] = {"max_rows": max_rows, "one_pass": one_pass}
            self.graphs = DecodeGraphs(model, self._entries, max_graphed, draft_entries, **sizes)
            self.cache.clear(num_pages)  # padding may look at any page

    def num_warm_ups(self, chunks: list[Chunk[Any]]) -> int:
        """Count the passes that `run` would make of these before the one that counts."""
        graphs = self.graphs
        if graphs is None or not chunks:
            return 0
        return graphs.num_warm_ups(chunks) if graphs.fit_step(chunks) or graphs.fit(chunks) else 0

    @torch.inference_mode()
    def run(
        self, chunks: list[Chunk[Any]], copies: list[Copy], before_Z: Tensor | None = None, *, graphed: bool = True
    ) -> SampledTokens:
        """Make the copies of pages, then compute chunks that are `in_order` and put their entries into the cache.

        A token is sampled behind each chunk that ends its sequence's text, and behind its draft. `before` are the
        tokens that the step before has sampled, int64, to which placeholders refer.
        Only where `graphed` may this be a graph.
        """
        graphs = self.graphs if graphed else None
        if graphs is not None and graphs.fit_step(chunks):
            self.cache.copy(copies)
            tokens_Z, graph = graphs.step(chunks, before_Z)
            return SampledTokens(tokens_Z, None if graph is None else graph.drafts_B, graph=graph)
        forward = self.forward(chunks, copies, before_Z, graphed)
        # Each row behind which a token is drawn, and the draft among its tokens that the sequence does not have yet.
        places = [(chunk.sequence, [chunk.draft][:ahead]) for chunk in chunks for ahead in range(chunk.num_sampled)]
        uniform = [sequence.uniform(len(drafts) + sequence.num_placeholders) for sequence, drafts in places]
        if any(sequence.guide is not None for sequence, _ in places):
            masks = [None if sequence.guide is None else sequence.guide.mask(drafts) for sequence, drafts in places]
            forward = forward._replace(logits_ZV=masked(forward.logits_ZV, masks))
        seen = None
        if any(sequence.counts is not None for sequence, _ in places):
            seen = [None if sequence.counts is None else sequence.counts.seen(drafts) for sequence, drafts in places]
        tokens_Z = choose(forward.logits_ZV, uniform, [sequence.sampling_params for sequence, _ in places], seen)
        return SampledTokens(tokens_Z, forward=forward)

    @torch.inference_mode()
    def run_on(self, before: GraphRun, sequences: list[Sequence[Any]], copies: list[Copy]) -> SampledTokens:
        """Compute the step after one that has made its drafts itself, of the same sequences.

        The host need not know its tokens yet. Pages must have room for whatever it has written, and two tokens more.
        """
        assert self.graphs is not None
        self.cache.copy(copies)
        graph = self.graphs.sample_on(before, sequences)
        return SampledTokens(graph.rows, graph.drafts_B, graph=graph)

    @torch.inference_mode()
    def forward(
        self, chunks: list[Chunk[Any]], copies: list[Copy], before_Z: Tensor | None = None, graphed: bool = True
    ) -> ForwardPass:
        """Do as `run`, without sampling."""
        self.cache.copy(copies)
        if self.graphs is not None and graphed and self.graphs.fit(chunks):
            graph = self.graphs.logits(chunks, before_Z)
            return ForwardPass(graph.rows, graph if self._drafts else None)
        step = build_step(chunks, self.model.device)
        if before_Z is not None and len(before_Z):
            step = replace(step, token_ids_M=resolve_placeholders(step.token_ids_M, before_Z))
        self.cache.clear(step.num_pages)
        step = replace(step, decodes=[replace(group, plan=self.model.plan(group)) for group in step.decodes])
        x_MD = self.model.hidden(step, self._entries)
        self._score_prompts(chunks, x_MD)
        return ForwardPass(self.model.logits(x_MD[step.sampled]), (step, x_MD) if self._drafts else None)

    def _score_prompts(self, chunks: list[Chunk[Any]], x_MD: Tensor) -> None:
        """Keep the logprobs of prompts' tokens, where they are wanted, from the states behind the tokens before them.

        A few rows at a time: logits of a whole prompt would be gigabytes.
        """
        row = 0
        for chunk in chunks:
            sequence, places = chunk.sequence, chunk.scored
            for start in range(places.start, places.stop, SCORED_ROWS):
                end = min(start + SCORED_ROWS, places.stop)
                logits_NV = self.model.logits(x_MD[row + start - chunk.start : row + end - chunk.start])
                following = list(sequence.prompt_ids[start + 1 : end + 1])
                most = sequence.sampling_params.prompt_logprobs
                assert most is not None
                sequence.prompt_logprobs += score(logits_NV, following, most)
            row += chunk.num_rows

    @torch.inference_mode()
    def draft(self, forward: ForwardPass, next_ids: list[int], rows: list[int]) -> Tensor:
        """Let the draft layers read a forward pass, with the token that follows each of its rows.

        It must be the last one. Returns logits of the token after that behind some `rows`, FP32 [rows, V].
        """
        assert isinstance(self.model, DraftingArchitecture)
        assert forward.hidden is not None
        if isinstance(forward.hidden, GraphRun):
            assert self.graphs is not None
            return self.graphs.draft(forward.hidden, next_ids, rows)
        step, x_MD = forward.hidden
        next_ids_M = torch.tensor(next_ids, device=x_MD.device)
        drafted_MD = self.model.draft_hidden(x_MD, next_ids_M, step, self._draft_entries)
        return self.model.logits(drafted_MD[torch.tensor(rows, dtype=torch.long, device=x_MD.device)])


def with_drafts(model: Architecture) -> CacheShape:
    """Shape of the cache where the model drafts. Raises ValueError for one that does not."""
    if not isinstance(model, DraftingArchitecture) or not model.num_draft_layers:
        raise ValueError("speculation needs a model with a multi-token prediction (MTP) layer; this one has none")
    return model.cache_shape._replace(num_layers=model.cache_shape.num_layers + model.num_draft_layers)
