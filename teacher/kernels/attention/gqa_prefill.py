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

from torch import Tensor

from teacher.kernels.attention.gqa_decode import fits
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_decode import LOG2_E
from teacher.kernels.attention.reference import PackedQueries, gqa_prefill_twin
from teacher.kernels.device import runs_kernels


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
