"""The two projections that MLA makes of a layer's input, as one product (DeepSeek-V3 s.2.1.1, eq. 1, 3 and 6).

q_a_proj and kv_a_proj_with_mqa read the same quantised tokens. One product of 1,536 + 576 = 2,112 columns reads them
once, costs one launch, and fills a large GPU where 576 columns are five tiles. Its two parts are used where they lie:
`rms_norm_quantise` and `write_latent` take rows of a wider tensor.

Shape legend: N tokens, D hidden, Q query latent, E = C + R latent and rope key, W = Q + E, P and G blocks of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.gemm import block_gemm
from teacher.kernels.quantise import Quantised
from teacher.model.fp8 import BLOCK


class LatentProjection(NamedTuple):
    """E4M3 weights, the queries' Q rows over the E of keys and values, with the factors of their 128x128 blocks."""

    weight_WD: Tensor
    scale_inv_PG: Tensor
    query_latent: int


def fuse_latent_projection(q_a: tuple[Tensor, Tensor], kv_a: tuple[Tensor, Tensor]) -> LatentProjection:
    """Stack (weight, scale_inv) of q_a_proj [Q, D] and of kv_a_proj_with_mqa [E, D], as checkpoints hold them.

    Done once, when a model is loaded. Raises ValueError where the stacked blocks would not be the given ones: unless
    128 divides Q and both have D columns.
    """
    (q_weight, q_scale), (kv_weight, kv_scale) = q_a, kv_a
    query_latent, hidden = q_weight.shape
    if query_latent % BLOCK or kv_weight.shape[1] != hidden:
        shapes = f"{tuple(q_weight.shape)} and {tuple(kv_weight.shape)}"
        raise ValueError(f"q_a_proj needs a multiple of {BLOCK} rows, and kv_a_proj as many columns; got {shapes}")
    # As bytes: torch joins no E4M3 tensors on some of its devices.
    weight = torch.cat((q_weight.view(torch.uint8), kv_weight.view(torch.uint8))).view(q_weight.dtype)
    return LatentProjection(weight, torch.cat((q_scale, kv_scale)), query_latent)


def project_latents(x: Quantised, projection: LatentProjection) -> tuple[Tensor, Tensor]:
    """(queries' latent [N, Q], latent and rope key [N, E]): BF16 parts of one tensor, whose rows are W apart."""
    out_NW = block_gemm(x, projection.weight_WD, projection.scale_inv_PG)
    return out_NW[:, : projection.query_latent], out_NW[:, projection.query_latent :]
