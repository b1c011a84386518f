"""Types of decoding schedules, head norms and packed prompts, and the plain-torch twins of what takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.attention.mla_cache import PAGE
from teacher.model.rope import rotate

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


class HeadNorms(NamedTuple):
    query_D: Tensor
    key_D: Tensor
    eps: float


def place_heads_twin(
    qkv_NX: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor],
    positions_N: Tensor,
    slots_N: Tensor,
    cache_LPE: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """`place_heads` in plain torch, for heads of any even width: queries [N, H, D]."""
    width = 2 * rotation[0].shape[1]
    values_from = num_heads * width + cache_LPE.shape[2] // 2
    query = qkv_NX[:, : num_heads * width].unflatten(1, (num_heads, width))
    keys = qkv_NX[:, num_heads * width : values_from].unflatten(1, (-1, width))
    if norms is not None:
        query = F.rms_norm(query, (width,), norms.query_D, norms.eps)
        keys = F.rms_norm(keys, (width,), norms.key_D, norms.eps)
    cos, sin = (table[positions_N].unsqueeze(1) for table in rotation)
    keys = rotate(keys, cos, sin, interleave=False).flatten(1)
    entries_NE = torch.cat((keys, qkv_NX[:, values_from:]), dim=1)
    written = slots_N >= 0
    cache_LPE.flatten(0, 1)[slots_N[written]] = entries_NE[written]
    return rotate(query, cos, sin, interleave=False)


START_PAGES = 2  # reading the queries and writing the result take about as long as two pages


class DecodeSchedule(NamedTuple):
    """int32. A share (first sequence, its first page, last sequence, its end); a sequence (first share, shares)."""

    shares_Z4: Tensor
    sequences_B2: Tensor


def schedule_decode_twin(lengths_B: Tensor, num_shares: int) -> DecodeSchedule:
    """`schedule_decode` in plain torch; the host reads the lengths."""
    pages_B = (lengths_B.long() + PAGE - 1) // PAGE
    units_B = torch.where(pages_B > 0, (pages_B + 1) // 2 * 2 + START_PAGES, 0)
    ends_B = units_B.cumsum(0)
    starts_B = ends_B - units_B + START_PAGES
    total = int(ends_B[-1])
    share = max(-(-total // (2 * num_shares)) * 2, 2)
    shares = []
    for begin in range(0, num_shares * share, share):
        end = min(begin + share, total)
        if begin >= end:
            shares.append((0, 0, -1, 0))
            continue
        first, last = (int((ends_B <= place).sum()) for place in (begin, end - 1))
        first_page = max(begin - int(starts_B[first]), 0)
        last_page = min(max(end - int(starts_B[last]), 0), int(pages_B[last]))
        shares.append((first, first_page, last, last_page))
    firsts_B = starts_B // share
    num_B = torch.where(pages_B > 0, (ends_B - 1) // share - firsts_B + 1, 0)
    shares_Z4 = torch.tensor(shares, dtype=torch.int32, device=lengths_B.device)
    return DecodeSchedule(shares_Z4, torch.stack((firsts_B, num_B), dim=1).to(torch.int32))


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
