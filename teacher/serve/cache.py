"""The latent cache: kv_lora_rank numbers and one rotated rope key a token and layer, and nothing else (V2 s.2.1).

One preallocated tensor, grown by doubling. Live sequences occupy the first slots without a gap, so that a decode step
reads a plain view: when a sequence ends, the last one moves into its slot.

Shape legend: L layers, S slots, P positions, C latent, R rope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.model.config import DeepseekV3Config

_FIRST_CAPACITY = 128


class LatentCache:
    def __init__(self, config: DeepseekV3Config, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_positions = config.max_position_embeddings
        width = config.kv_lora_rank + config.qk_rope_head_dim
        capacity = min(_FIRST_CAPACITY, self.max_positions)
        self.entries_LSPE = torch.zeros(
            config.num_hidden_layers, num_slots, capacity, width, dtype=dtype, device=device
        )

    @property
    def bytes_per_token(self) -> int:
        num_layers, _, _, width = self.entries_LSPE.shape
        return num_layers * width * self.entries_LSPE.element_size()

    def reserve(self, num_positions: int) -> None:
        """Make room for sequences of `num_positions` tokens."""
        capacity = self.entries_LSPE.shape[2]
        if num_positions <= capacity:
            return
        while capacity < num_positions:
            capacity *= 2
        old = self.entries_LSPE
        num_layers, num_slots, kept, width = old.shape
        # Zeros, not empty: masked positions are multiplied by zero, and zero times garbage may be NaN.
        self.entries_LSPE = old.new_zeros(num_layers, num_slots, min(capacity, self.max_positions), width)
        self.entries_LSPE[:, :, :kept] = old

    def write(self, layer: int, slots_N: Tensor, positions_N: Tensor, entries_NE: Tensor) -> None:
        self.entries_LSPE[layer].index_put_((slots_N, positions_N), entries_NE)

    def live(self, layer: int, num_slots: int, num_positions: int) -> Tensor:
        """View of the first slots and positions, [S, P, C + R]."""
        return self.entries_LSPE[layer, :num_slots, :num_positions]

    @torch.inference_mode()
    def move(self, source: int, target: int, num_positions: int) -> None:
        self.entries_LSPE[:, target, :num_positions] = self.entries_LSPE[:, source, :num_positions]
