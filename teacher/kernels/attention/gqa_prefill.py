"""Grouped-query attention over a paged cache of keys and values, for prompts: many queries of several sequences at
once.

The queries of all sequences lie one behind the other, so no row is spent on the difference between a short prompt and a
long one. Blocks of them are listed on the device, each within one sequence: one CUDA graph serves any prompts that fit
its numbers of rows, sequences and blocks. Pages are read in place, those of earlier chunks and of shared beginnings
too.

Shape legend: M rows, K sequences, N blocks, H heads, J key-value heads, D width of a head, L pages, P positions a page,
Q pages a sequence, E = 2 J D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.attention.gqa_decode import fits
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_decode import LOG2_E
from teacher.kernels.device import runs_kernels

QUERY_BLOCK = 64  # rows of a program


class PackedQueries(NamedTuple):
    """The rows of several sequences, int32: `spans` are a sequence's first row, the one behind its last, and its
    length.

    Its rows are its last tokens. A block is a sequence and its first row of QUERY_BLOCK; sequence -1: no block.
    `pages` holds the cache's page for each PAGE tokens of a sequence.
    """

    spans_K3: Tensor
    blocks_N2: Tensor
    pages_KQ: Tensor


def gqa_prefill(query_MHD: Tensor, cache_LPE: Tensor, packed: PackedQueries, *, scale: float, kv_heads: int) -> Tensor:
    """Causal attention, [M, H, D] in the query's dtype (BF16 or FP32, the cache's).

    An entry of `cache` is J keys and J values; D is a power of two from 16 to 128. Rows that no sequence has are left
    as memory was. Places beyond a sequence's length count for nothing, whatever they hold. Raises ValueError for
    another page size or width, and for heads that are no whole groups.
    """
    _, num_heads, width = query_MHD.shape
    if cache_LPE.shape[1] != PAGE:
        raise ValueError(f"pages must hold {PAGE} tokens, got {cache_LPE.shape[1]}")
    if num_heads % kv_heads or cache_LPE.shape[2] != 2 * kv_heads * width:
        given = f"{num_heads} heads of {width}, {kv_heads} key-value heads, entries of {cache_LPE.shape[2]}"
        raise ValueError(f"an entry must be the keys and values of whole groups, got {given}")
    if not runs_kernels(query_MHD):
        return gqa_prefill_twin(query_MHD, cache_LPE, packed, scale=scale, kv_heads=kv_heads)
    if not fits(width):
        raise ValueError(f"the width of a head must be a power of two from 16 to 128, got {width}")
    from teacher.kernels.attention.gqa_prefill_triton import prefill_kernel

    return prefill_kernel(query_MHD.contiguous(), cache_LPE, packed, scale_log2=scale * LOG2_E, kv_heads=kv_heads)


def gqa_prefill_twin(
    query_MHD: Tensor, cache_LPE: Tensor, packed: PackedQueries, *, scale: float, kv_heads: int
) -> Tensor:
    """`gqa_prefill` in plain torch, a sequence at a time, in FP32: [M, H, D], zeros where no sequence has rows."""
    out_MHD = torch.zeros_like(query_MHD)
    for (first, end, length), pages_Q in zip(packed.spans_K3.tolist(), packed.pages_KQ, strict=True):
        if first == end:
            continue
        entries_UE = cache_LPE[pages_Q[: -(-length // PAGE)].long()].flatten(0, 1)[:length].float()
        keys_JUD, values_JUD = entries_UE.unflatten(1, (2, kv_heads, -1)).permute(1, 2, 0, 3)
        query_JGTD = query_MHD[first:end].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        logits_JGTU = query_JGTD @ keys_JUD[:, None].transpose(2, 3) * scale
        hidden_TU = torch.ones(end - first, length, dtype=torch.bool, device=logits_JGTU.device)
        weights_JGTU = logits_JGTU.masked_fill(hidden_TU.triu(length - (end - first) + 1), float("-inf")).softmax(-1)
        out_MHD[first:end] = (weights_JGTU @ values_JUD[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(out_MHD.dtype)
    return out_MHD
