"""The latent cache: kv_lora_rank numbers and one rotated rope key a token and layer, and nothing else (V2 s.2.1).

Pages of 64 tokens, in the layout that the decoding kernels read. On a CPU memory is touched page by page as it is
first needed; on a GPU all of it is claimed at once.

Shape legend: L layers, P pages, S places a page, E = C + R latent and rope key.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from teacher.kernels.mla_cache import PAGE
from teacher.model.config import DeepseekV3Config
from teacher.serve.block_manager import Copy

_CPU_BYTES = 1 << 30
_CUDA_SHARE = 0.8  # of what is free once the weights are there; the rest is for a step's own tensors


class LatentCache:
    """Pages are there in whole extents: attention over a shorter piece may read to the end of its extent, masked."""

    def __init__(
        self, config: DeepseekV3Config, num_pages: int, dtype: torch.dtype, device: torch.device, *, extent: int = 1
    ) -> None:
        self._extent = extent
        num_pages = -(-num_pages // extent) * extent
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = config.num_hidden_layers, num_pages, PAGE, width
        self.entries_LPSE = torch.empty(shape, dtype=dtype, device=device)
        self._num_clear = 0
        if device.type != "cpu":
            self.clear(num_pages)

    @property
    def bytes_per_token(self) -> int:
        num_layers, _, _, width = self.entries_LPSE.shape
        return num_layers * width * self.entries_LPSE.element_size()

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


def default_num_pages(config: DeepseekV3Config, batch_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Pages for `batch_size` sequences of the greatest length, or what memory allows, but for one of them at least."""
    a_sequence = -(-config.max_position_embeddings // PAGE)
    page_bytes = config.num_hidden_layers * PAGE * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    allowed = _CPU_BYTES if device.type == "cpu" else int(_CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(batch_size * a_sequence, max(allowed // page_bytes, a_sequence))
