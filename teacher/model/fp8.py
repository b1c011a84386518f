"""Block-scaled FP8 weights as DeepSeek-V3 stores them (s.3.3): E4M3 with one FP32 factor per 128x128 block.

`weight ~= quantised.float() * scale_inv[block]`. A matrix whose sides 128 does not divide has ragged blocks at its
right and lower edge (kv_a_proj_with_mqa has 576 rows); each keeps a factor of its own. transformers 5.17 misreads
those, so this file does not use it.

Shape legend: R rows, C columns, P = ceil(R / 128), Q = ceil(C / 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


class BlockMatrix(NamedTuple):
    """E4M3 [..., R, C] and the FP32 factors of its blocks [..., P, Q]."""

    values: Tensor
    scale_inv: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> BlockMatrix:
        *stack, num_rows, num_columns = shape
        scales = *stack, *scale_shape((num_rows, num_columns))
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return cls(values, torch.empty(scales, dtype=torch.float32, device=device))

    def rows(self, rows: slice) -> BlockMatrix:
        """A view of whole blocks' rows, of a matrix that is not stacked."""
        start, stop, _ = rows.indices(self.values.shape[0])
        assert start % BLOCK == 0
        assert stop % BLOCK == 0 or stop == self.values.shape[0]
        return BlockMatrix(self.values[start:stop], self.scale_inv[start // BLOCK : -(-stop // BLOCK)])


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def quantise_blocks(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(quantised E4M3 [R, C], scale_inv FP32 [P, Q]); each block's largest magnitude maps to 448.

    A block of zeros gets the factor 1. The weight must be finite.
    """
    num_rows, num_columns = weight_RC.shape
    num_p, num_q = scale_shape((num_rows, num_columns))
    padded = weight_RC.new_zeros(num_p * BLOCK, num_q * BLOCK, dtype=torch.float32)
    padded[:num_rows, :num_columns] = weight_RC
    largest_PQ = padded.view(num_p, BLOCK, num_q, BLOCK).abs().amax(dim=(1, 3))
    # By a tensor: torch on a GPU divides by a Python number as it multiplies by its reciprocal, which rounds twice.
    scale_inv_PQ = largest_PQ / torch.full_like(largest_PQ, E4M3_MAX)
    scale_inv_PQ = torch.where(largest_PQ > 0, scale_inv_PQ, torch.ones_like(largest_PQ))
    # A block of subnormal numbers: its factor would underflow to zero.
    scale_inv_PQ = scale_inv_PQ.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = weight_RC.float() / expand_scales(scale_inv_PQ, (num_rows, num_columns))
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_inv_PQ


def dequantise_blocks(quantised_RC: Tensor, scale_inv_PQ: Tensor) -> Tensor:
    """FP32 [R, C]."""
    shape = (quantised_RC.shape[0], quantised_RC.shape[1])
    if tuple(scale_inv_PQ.shape) != scale_shape(shape):
        raise ValueError(f"scales for {shape} must be {scale_shape(shape)}, got {tuple(scale_inv_PQ.shape)}")
    return quantised_RC.float() * expand_scales(scale_inv_PQ.float(), shape)


def expand_scales(scale_inv_PQ: Tensor, shape: tuple[int, int]) -> Tensor:
    """Each factor over its block, [R, C]."""
    rows = scale_inv_PQ.repeat_interleave(BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
