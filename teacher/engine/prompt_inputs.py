"""Static tensors from which graphs that read several prompts at once take them, and how the host fills them.

Prompts of any lengths lie one behind the other in as many rows as a shape has, the rest being padding: slot -1, so it
is written nowhere, in no sequence, so nothing is attended. Shapes are close enough together that padding is a fifth of
the rows on average, and few enough that all of them are soon captured. All numbers of a shape lie together, in an order
of its own: one copy fills them, which the host does not wait for.

Shape legend: R rows, K prompts, N blocks of queries, Q pages a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacher.engine.scheduler import Chunk
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.reference import QUERY_BLOCK, PackedQueries

_ROWS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_ROWS_A_PROMPT = 32  # of which a shape has room for one more, four at least


class PromptShape(NamedTuple):
    """Rows that a graph computes, and prompts that they may belong to."""

    num_rows: int
    num_prompts: int

    @property
    def num_blocks(self) -> int:
        return self.num_rows // QUERY_BLOCK + self.num_prompts

    @property
    def num_numbers(self) -> int:
        return 3 * self.num_rows + 3 * self.num_prompts + 2 * self.num_blocks


_SHAPES = [PromptShape(rows, max(rows // _ROWS_A_PROMPT, 4)) for rows in _ROWS]


def shapes_up_to(num_rows: int) -> list[PromptShape]:
    """Shapes that steps of so many rows of prompts can need."""
    return [shape for shape, before in zip(_SHAPES, [0, *_ROWS], strict=False) if before < num_rows]


class PackedPrompts(NamedTuple):
    """A shape's inputs, int32 on the device."""

    token_ids_R: Tensor
    positions_R: Tensor
    slots_R: Tensor
    queries: PackedQueries


class PromptInputs:
    """Inputs of all graphs that read prompts of up to `most_rows` tokens together, `num_pages` pages a sequence."""

    def __init__(self, most_rows: int, num_pages: int, device: torch.device) -> None:
        self.shapes = shapes_up_to(most_rows)
        largest = self.shapes[-1]
        self._device = device
        self._numbers = torch.zeros(largest.num_numbers, dtype=torch.int32, device=device)
        self._pages_KQ = torch.zeros(largest.num_prompts, num_pages, dtype=torch.int32, device=device)
        self.sampling_K8 = torch.ones(largest.num_prompts, 8, dtype=torch.float64, device=device)

    def shape_for(self, chunks: list[Chunk[Any]]) -> PromptShape | None:
        """The smallest shape for these prompts, or pieces of them; None: there is none."""
        rows, prompts = sum(chunk.count for chunk in chunks), len(chunks)
        return next((s for s in self.shapes if s.num_rows >= rows and s.num_prompts >= prompts), None)

    def of(self, shape: PromptShape) -> PackedPrompts:
        """Where a shape's inputs lie."""
        rows, prompts, numbers = shape.num_rows, shape.num_prompts, self._numbers[: shape.num_numbers]
        table_3R, spans, blocks = numbers.split((3 * rows, 3 * prompts, 2 * shape.num_blocks))
        queries = PackedQueries(spans.view(-1, 3), blocks.view(-1, 2), self._pages_KQ[:prompts])
        return PackedPrompts(*table_3R.view(3, -1), queries)

    def fill(self, chunks: list[Chunk[Any]], shape: PromptShape) -> None:
        """Put pieces of prompts, the first of which has the first rows."""
        host = torch.empty(shape.num_numbers, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        numbers, rows = host.numpy(), shape.num_rows
        token_ids, positions, slots = numbers[: 3 * rows].reshape(3, rows)
        spans, blocks = np.split(numbers[3 * rows :], [3 * shape.num_prompts])
        spans, blocks = spans.reshape(-1, 3), blocks.reshape(-1, 2)
        numbers[:], slots[:], blocks[:] = 0, -1, -1
        widest = max((len(chunk.sequence.pages) for chunk in chunks), default=0)
        host_pages = torch.zeros(len(chunks), widest, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        pages_KQ = host_pages.numpy()
        row = block = 0
        for number, chunk in enumerate(chunks):
            pages = chunk.sequence.pages
            pages_KQ[number, : len(pages)] = pages
            own, places = slice(row, row + chunk.count), np.arange(chunk.start, chunk.end)
            token_ids[own], positions[own] = chunk.token_ids, places
            slots[own] = pages_KQ[number, places // PAGE] * PAGE + places % PAGE
            spans[number] = row, own.stop, chunk.end
            firsts = np.arange(row, own.stop, QUERY_BLOCK)
            blocks[block : block + len(firsts), 0], blocks[block : block + len(firsts), 1] = number, firsts
            row, block = own.stop, block + len(firsts)
        self._numbers[: len(numbers)].copy_(host, non_blocking=True)
        self._pages_KQ[: len(chunks), :widest] = host_pages.to(self._device, non_blocking=True)
