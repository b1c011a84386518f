"""What one step computes, as tensors, built once for all layers.

Rows are tokens: first one of each sequence that decodes, then the chunks of prompts, one after another.

Shape legend: M rows, B decoding sequences, Q pages a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teacher.kernels.mla_cache import PAGE
from teacher.serve.block_manager import num_pages_for
from teacher.serve.scheduler import Chunk


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
    """Each sequence's pages, and its tokens with the one that is computed now, in the order of the rows."""

    pages: list[list[int]]
    lengths: list[int]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Step:
    """`slots_M` is page * PAGE + place; `sampled` are the rows whose logits are wanted."""

    token_ids_M: Tensor
    positions_M: Tensor
    slots_M: Tensor
    decodes: Decodes
    chunks: list[PromptChunk]
    sampled: Tensor
    num_pages: int
    plan: Any = field(default=None)


def in_order(chunks: list[Chunk[Any]]) -> list[Chunk[Any]]:
    """Decoding sequences first, by where their last pages lie: neighbours in the cache are neighbours in the step."""
    decodes = [chunk for chunk in chunks if chunk.count == 1]
    return sorted(decodes, key=lambda chunk: chunk.sequence.pages[-1]) + [c for c in chunks if c.count > 1]


def build_step(chunks: list[Chunk[Any]], device: torch.device) -> Step:
    """Of chunks `in_order`."""
    decodes = Decodes([], [])
    prompts: list[PromptChunk] = []
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    highest = 0
    for chunk in chunks:
        sequence, start, end = chunk.sequence, chunk.sequence.num_computed, chunk.end
        pages = sequence.pages[: num_pages_for(end)]
        highest = max(highest, *pages)
        if chunk.count == 1:
            decodes.pages.append(pages)
            decodes.lengths.append(end)
        else:
            row = len(token_ids)
            prompts.append(PromptChunk(row, row + chunk.count, end, torch.tensor(pages, device=device)))
        token_ids += sequence.tokens(start, end)
        positions += range(start, end)
        slots += [pages[place // PAGE] * PAGE + place % PAGE for place in range(start, end)]
        if chunk.ends_text:
            sampled.append(len(token_ids) - 1)
    table = torch.tensor([token_ids, positions, slots], device=device)
    return Step(*table, decodes, prompts, torch.tensor(sampled, dtype=torch.long, device=device), highest + 1)
