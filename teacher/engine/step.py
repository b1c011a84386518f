"""A step: what one forward pass computes, as tensors, built once for all layers.

Rows are tokens: first one of each sequence that decodes without a draft, then two of each that has one, then the chunks
of prompts, one after another.

Shape legend: M rows, B sequences that decode, Q pages a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from teacher.engine.block_manager import num_pages_for
from teacher.engine.scheduler import Chunk
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import PackedQueries


@dataclass(frozen=True)
class PromptChunk:
    """Rows `start` to `end` of a step: the last tokens of `context` ones, which lie in `pages`, int64."""

    start: int
    end: int
    context: int
    pages: Tensor

    @property
    def num_queries(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Decodes:
    """Each sequence's pages, and its tokens with the `num_queries` that are computed now, in the order of the rows.

    Query i of s sees all tokens of its sequence but the last s - 1 - i.
    """

    pages: list[list[int]]
    lengths: list[int]
    num_queries: int = 1
    plan: Any = None  # the model's, of these pages and lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        return len(self.lengths) * self.num_queries

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pages [B, Q], zero behind a sequence's last, and lengths [B], int32."""
        widest = max(len(pages) for pages in self.pages)
        pages_BQ = torch.tensor([pages + [0] * (widest - len(pages)) for pages in self.pages], dtype=torch.int32)
        return pages_BQ.to(device), torch.tensor(self.lengths, dtype=torch.int32).to(device)


@dataclass(frozen=True)
class Step:
    """`slots_M` is page * PAGE + place; `sampled` are the rows whose logits are wanted.

    `decodes` is one group for every number of queries that there is, fewest first.
    """

    token_ids_M: Tensor
    positions_M: Tensor
    slots_M: Tensor
    decodes: list[Decodes]
    chunks: list[PromptChunk]
    sampled: Tensor
    num_pages: int
    packed: PackedQueries | None = None  # in the place of decodes and chunks: prompts that a graph reads


def in_order(chunks: list[Chunk[Any]], *, extent: int = 1) -> list[Chunk[Any]]:
    """Decoding sequences first, those with a draft last of them; then prompts, those that go on last.

    With extents neighbours in the cache are neighbours in the step: sequences stand by where their last pages lie.
    """
    decodes = [chunk for chunk in chunks if chunk.count == 1]
    if extent > 1:
        decodes.sort(key=lambda chunk: (chunk.num_rows, chunk.sequence.pages[-1]))
    elif any(chunk.draft is not None for chunk in decodes):
        decodes.sort(key=lambda chunk: chunk.num_rows)
    prompts = [chunk for chunk in chunks if chunk.count > 1]
    prompts.sort(key=lambda chunk: not chunk.ends_text)
    return decodes + prompts


def build_step(chunks: list[Chunk[Any]], device: torch.device) -> Step:
    """Build the tensors of chunks that are `in_order`."""
    decodes: list[Decodes] = []
    prompts: list[PromptChunk] = []
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    highest = 0
    for chunk in chunks:
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        pages = sequence.pages[: num_pages_for(end)]
        highest = max(highest, *pages)
        if chunk.count == 1:
            if not decodes or decodes[-1].num_queries != chunk.num_rows:
                decodes.append(Decodes([], [], chunk.num_rows))
            decodes[-1].pages.append(pages)
            decodes[-1].lengths.append(end)
        else:
            row = len(token_ids)
            prompts.append(PromptChunk(row, row + chunk.count, end, torch.tensor(pages, device=device)))
        token_ids += chunk.token_ids
        positions += range(start, end)
        slots += [pages[place // PAGE] * PAGE + place % PAGE for place in range(start, end)]
        sampled += range(len(token_ids) - chunk.num_sampled, len(token_ids))
    table = torch.tensor([token_ids, positions, slots], device=device)
    return Step(*table, decodes, prompts, torch.tensor(sampled, dtype=torch.long, device=device), highest + 1)


def halved(step: Step, plan: Callable[[Decodes], Any]) -> tuple[Step, Step]:
    """The rows of a step as two, as equal as whole sequences that decode allow; the second attends to the first's.

    `plan` is the model's: groups of decoding sequences that are cut need another one each.
    """
    cut, row = len(step.token_ids_M) // 2, 0
    for group in step.decodes:
        if row < cut < row + group.num_rows:
            cut -= (cut - row) % group.num_queries
        row += group.num_rows
    decodes: tuple[list[Decodes], list[Decodes]] = ([], [])
    row = 0
    for group in step.decodes:
        num_first = max(0, min(len(group), (cut - row) // group.num_queries))
        row += group.num_rows
        for half, part in zip(decodes, (slice(num_first), slice(num_first, None)), strict=True):
            of_half = replace(group, pages=group.pages[part], lengths=group.lengths[part])
            if of_half.lengths:
                half.append(group if len(of_half) == len(group) else replace(of_half, plan=plan(of_half)))
    chunks: tuple[list[PromptChunk], list[PromptChunk]] = ([], [])
    for chunk in step.chunks:
        if chunk.start < cut:
            end = min(chunk.end, cut)
            chunks[0].append(PromptChunk(chunk.start, end, chunk.context - (chunk.end - end), chunk.pages))
        if chunk.end > cut:
            start = max(chunk.start, cut)
            chunks[1].append(PromptChunk(start - cut, chunk.end - cut, chunk.context, chunk.pages))
    rows = slice(cut), slice(cut, None)
    first, second = (
        replace(
            step,
            token_ids_M=step.token_ids_M[part],
            positions_M=step.positions_M[part],
            slots_M=step.slots_M[part],
            decodes=of_decodes,
            chunks=of_chunks,
        )
        for part, of_decodes, of_chunks in zip(rows, decodes, chunks, strict=True)
    )
    return first, second
