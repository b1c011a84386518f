"""Grouped-query attention (arXiv 2305.13245) over a paged cache of keys and values, for decoding.

The heads of a group share a key-value head, so a program holds them all and reads its pages once. `mla_schedule` cuts
the step's pages into shares of equal length, `mla_combine_triton` joins the parts of sequences that span several
(Flash-Decoding): lengths stay on the device, and one CUDA graph serves any of them.

Shape legend: B sequences, H heads, J key-value heads, D width of a head, L pages, P positions a page, Q pages a
sequence, E = 2 J D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.attention.mla_decode import LOG2_E
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import DecodeSchedule
from teacher.kernels.device import num_multiprocessors, runs_kernels

# At once on a multiprocessor: a program is small, and waiting for memory is most of its time.
_PROGRAMS_TOGETHER = 4


def gqa_decode(
    query_BHD: Tensor,
    cache_LPE: Tensor,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    kv_heads: int,
    schedule: DecodeSchedule | None = None,
) -> Tensor:
    """Attention output, [B, H, D] in the query's dtype (BF16 or FP32, the cache's).

    An entry of `cache` is J keys and J values; D is a power of two from 16 to 128. `pages` int32 holds the cache's page
    for each PAGE tokens of a sequence, `lengths` int32 its tokens with the query's own; 0 is a row of padding, whose
    output is zero. Neither pages that no sequence owns nor places beyond a sequence's length are used, whatever they
    hold. `schedule` is that of these lengths and `num_shares` shares; a step makes it once for all layers.
    Raises ValueError for another page size or width, and for heads that are no whole groups.
    """
    num_sequences, num_heads, width = query_BHD.shape
    if cache_LPE.shape[1] != PAGE:
        raise ValueError(f"pages must hold {PAGE} tokens, got {cache_LPE.shape[1]}")
    if num_heads % kv_heads or cache_LPE.shape[2] != 2 * kv_heads * width:
        given = f"{num_heads} heads of {width}, {kv_heads} key-value heads, entries of {cache_LPE.shape[2]}"
        raise ValueError(f"an entry must be the keys and values of whole groups, got {given}")
    if not runs_kernels(query_BHD):
        return gqa_decode_twin(query_BHD, cache_LPE, pages_BQ, lengths_B, scale=scale, kv_heads=kv_heads)
    if not fits(width):
        raise ValueError(f"the width of a head must be a power of two from 16 to 128, got {width}")
    if schedule is None:
        schedule = schedule_decode(lengths_B, num_shares(query_BHD.device, kv_heads))
    slots = 2 * schedule.shares_Z4.shape[0]
    parts_2ZHD = query_BHD.new_empty(slots, num_heads, width, dtype=torch.float32)
    lse_2ZH = query_BHD.new_empty(slots, num_heads, dtype=torch.float32)
    out_BHD = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    from teacher.kernels.attention.gqa_decode_triton import decode_kernel
    from teacher.kernels.attention.mla_combine_triton import combine_kernel

    decode_kernel(
        query_BHD.contiguous(), cache_LPE, pages_BQ, lengths_B, schedule.shares_Z4, parts_2ZHD, lse_2ZH, out_BHD,
        scale_log2=scale * LOG2_E, kv_heads=kv_heads,
    )  # fmt: skip
    combine_kernel(parts_2ZHD, lse_2ZH, out_BHD.view(num_sequences, 1, num_heads, width), schedule)
    return out_BHD


def fits(width: int) -> bool:
    """Tell whether the kernel takes heads of this width."""
    return 16 <= width <= 128 and width & (width - 1) == 0


def num_shares(device: torch.device, kv_heads: int) -> int:
    """Shares for one wave: every share needs a program for each key-value head."""
    return max(_PROGRAMS_TOGETHER * num_multiprocessors(device) // kv_heads, 1)


def gqa_decode_twin(
    query_BHD: Tensor, cache_LPE: Tensor, pages_BQ: Tensor, lengths_B: Tensor, *, scale: float, kv_heads: int
) -> Tensor:
    """`gqa_decode` in plain torch, a sequence at a time, in FP32: [B, H, D] in the query's dtype."""
    outs = []
    for query_HD, pages_Q, length in zip(query_BHD.float(), pages_BQ, lengths_B.tolist(), strict=True):
        if not length:
            outs.append(torch.zeros_like(query_HD))
            continue
        entries_TE = cache_LPE[pages_Q[: -(-length // PAGE)].long()].flatten(0, 1)[:length].float()
        keys_JTD, values_JTD = entries_TE.unflatten(1, (2, kv_heads, -1)).permute(1, 2, 0, 3)
        query_JGD = query_HD.unflatten(0, (kv_heads, -1))
        weights_JGT = (query_JGD @ keys_JTD.transpose(1, 2) * scale).softmax(dim=-1)
        outs.append((weights_JGT @ values_JTD).flatten(0, 1))
    return torch.stack(outs).to(query_BHD.dtype)
