"""Absorbed MLA over the paged latent cache (DeepSeek-V2 arXiv 2405.04434 s.2.1.2 and appendix C), for decoding.

All heads share one latent and one rope key a token, so a step reads 1,152 bytes of cache a token (BF16) and does
278,528 FLOP with it at 128 heads: it is bound by arithmetic, not by memory, unlike other attention. The up-projection
of the keys is in the queries already; that of the values is the caller's to apply to the result.

One or two queries a sequence (two: a draft token and its verification); query i of s sees all but the last s - 1 - i
tokens. The context is cut into parts so that few long sequences fill a GPU; parts are joined by their log-sum-exp.

Shape legend: B sequences, S queries each, H heads, C latent, R rope, L pages, P positions a page, Q pages a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels

PAGE = 64


class DecodePlan(NamedTuple):
    """`heads` rows (query times head) a program, `pages_a_part` pages of context a program."""

    heads: int = 64
    pages_a_part: int = 16
    num_warps: int = 8
    num_stages: int = 2


def mla_decode(
    query_BSHE: Tensor,
    cache_LPE: Tensor,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    latent: int,
    plan: DecodePlan | None = None,
) -> Tensor:
    """Attention output in the latent space, [B, S, H, C] in the query's dtype.

    E = C + R in `query` (absorbed part first, rotated part after it) and in `cache`; `latent` is C. `pages` int32 holds
    the cache's page for each PAGE tokens of a sequence, `lengths` int32 its tokens with the queries' own, at least S.
    Raises ValueError for a page size other than PAGE.
    """
    if cache_LPE.shape[1] != PAGE:
        raise ValueError(f"pages must hold {PAGE} tokens, got {cache_LPE.shape[1]}")
    if runs_kernels(query_BSHE):
        from teacher.kernels.mla_decode_triton import mla_decode_kernel

        chosen = plan or DecodePlan()
        return mla_decode_kernel(query_BSHE, cache_LPE, pages_BQ, lengths_B, scale=scale, latent=latent, plan=chosen)
    return mla_decode_twin(query_BSHE, cache_LPE, pages_BQ, lengths_B, scale=scale, latent=latent)


def mla_decode_twin(
    query_BSHE: Tensor, cache_LPE: Tensor, pages_BQ: Tensor, lengths_B: Tensor, *, scale: float, latent: int
) -> Tensor:
    num_queries = query_BSHE.shape[1]
    outs = []
    for query_SHE, pages_Q, length in zip(query_BSHE.float(), pages_BQ, lengths_B.tolist(), strict=True):
        entries_TE = cache_LPE[pages_Q.long()].flatten(0, 1)[:length].float()
        logits_SHT = query_SHE @ entries_TE.T * scale
        last_S = length - num_queries + torch.arange(num_queries, device=logits_SHT.device)
        hidden_ST = torch.arange(length, device=logits_SHT.device)[None, :] > last_S[:, None]
        weights_SHT = logits_SHT.masked_fill(hidden_ST[:, None, :], float("-inf")).softmax(dim=-1)
        outs.append(weights_SHT @ entries_TE[:, :latent])
    return torch.stack(outs).to(query_BSHE.dtype)
