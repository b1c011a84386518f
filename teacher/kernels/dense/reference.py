"""Plans of the block-scaled product, and its plain-torch twin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK


class GemmTiling(NamedTuple):
    """Cut of one product. `weights_first` puts the weights' rows on the tensor core's long side: for few tokens."""

    rows: int  # tokens a tile, a power of two from 16
    columns: int  # outputs a tile: 32, 64 or 128; 256 is the form for Hopper alone, which chooses the rest itself
    splits: int = 1  # parts of K that are summed afterwards, in their order
    weights_first: bool = False
    num_warps: int = 4
    num_stages: int = 4
    loader: bool = False  # on Hopper one more warp that only loads; takes weights first, and 4 warps to multiply


HOPPER_COLUMNS = 256
MANY_ROWS = GemmTiling(rows=128, columns=HOPPER_COLUMNS)  # the plain one where the GPU is not Hopper
MANY_ROWS_PLAIN = GemmTiling(rows=128, columns=128, num_warps=8, num_stages=3)


def block_gemm_twin(
    x: Quantised, weight_NK: Tensor, scale_inv_PG: Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`block_gemm` in plain torch, one 128 of K after the other: [M, N] in `dtype`."""
    values_MGB = x.values_MK.float().unflatten(1, (-1, BLOCK))
    weight_NGB = weight_NK.float().unflatten(1, (-1, BLOCK))
    scale_NG = scale_inv_PG.repeat_interleave(BLOCK, dim=0)[: weight_NK.shape[0]]
    out_MN = values_MGB.new_zeros(x.values_MK.shape[0], weight_NK.shape[0])
    for group in range(values_MGB.shape[1]):
        products_MN = values_MGB[:, group] @ weight_NGB[:, group].T
        out_MN += products_MN * (x.scale_inv_MG[:, group, None] * scale_NG[None, :, group])
    return out_MN.to(dtype)
