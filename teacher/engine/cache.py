"""The paged cache: pages of 64 tokens, for each layer the E numbers that its attention keeps of a token.

MLA keeps kv_lora_rank numbers and one rotated rope key, and nothing else (DeepSeek-V2 s.2.1). On a CPU memory is
touched page by page as it is first needed; on a GPU all of it is claimed at once.

Shape legend: L layers, P pages, S places a page, E numbers a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.engine.block_manager import Copy
from teacher.engine.step import PromptChunk
from teacher.kernels.attention.mla_cache import PAGE

_CPU_BYTES = 1 << 30
_CUDA_SHARE = 0.8  # of what is free once the weights are there; the rest is for a step's own tensors


class CacheShape(NamedTuple):
    """Shape of a model's cache: `width` numbers of a token in each layer."""

    num_layers: int
    width: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_layers * self.width * dtype.itemsize


class PagedCache:
    """Pages are there in whole extents: attention over a shorter piece may read to the end of its extent, masked."""

    def __init__(
        self, shape: CacheShape, num_pages: int, dtype: torch.dtype, device: torch.device, *, extent: int = 1
    ) -> None:
        self._extent = extent
        num_pages = -(-num_pages // extent) * extent
        self.entries_LPSE = torch.empty(shape.num_layers, num_pages, PAGE, shape.width, dtype=dtype, device=device)
        self._num_clear = 0
        if device.type != "cpu":
            self.clear(num_pages)

    def clear(self, num_pages: int) -> None:
        """Make sure that the first pages hold numbers: a masked place counts zero times, but zero times NaN is NaN."""
        num_pages = -(-num_pages // self._extent) * self._extent
        if num_pages > self._num_clear:
            self.entries_LPSE[:, self._num_clear : num_pages] = 0
            self._num_clear = num_pages

    def copy(self, copies: Iterable[Copy]) -> None:
        for source, target in copies:
            self.clear(max(source, target) + 1)
            self.entries_LPSE[:, target] = self.entries_LPSE[:, source]


def cache_bytes(free_bytes: int) -> int:
    """What a GPU's cache may take of what is free once the weights are there."""
    return int(_CUDA_SHARE * free_bytes)


def default_num_pages(
    shape: CacheShape, batch_size: int, max_positions: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Pages for `batch_size` sequences of the greatest length, or what memory allows, but for one of them at least."""
    a_sequence = -(-max_positions // PAGE)
    allowed = _CPU_BYTES if device.type == "cpu" else cache_bytes(torch.cuda.mem_get_info(device)[0])
    return min(batch_size * a_sequence, max(allowed // (PAGE * shape.bytes_per_token(dtype)), a_sequence))


def gathered(cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
    """The entries of a chunk's context, [U, E]."""
    return torch.index_select(cache_PSE, 0, chunk.pages).flatten(0, 1)[: chunk.context]
