"""Absorbed MLA over the paged latent cache (DeepSeek-V2 arXiv 2405.04434 s.2.1.2 and appendix C), for decoding.

All heads share one latent and one rope key a token, so a step reads 1,152 bytes of cache a token (BF16) and does
278,528 FLOP with it at 128 heads: it is bound by arithmetic, not by memory, unlike other attention. The up-projection
of the keys is in the queries already; that of the values is the caller's to apply to the result.

One or two queries a sequence (two: a draft token and its verification); query i of s sees all but the last s - 1 - i
tokens. `mla_schedule` cuts the work into shares, `mla_combine_triton` joins the parts of sequences that span several.
Two kernels compute a share: `mla_decode_gluon` on Hopper at DeepSeek-V3's widths, `mla_decode_triton` elsewhere.

Shape legend: B sequences, S queries each, H heads, C latent, R rope, L pages, P positions a page, Q pages a sequence.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from teacher.kernels.attention.mla_cache import PAGE, dequantise, entries, is_fp8
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import DecodeSchedule
from teacher.kernels.device import num_multiprocessors, runs_hopper_kernels, runs_kernels

ROWS = 64  # rows (queries times heads) a program: their products with C columns fill its registers
LOG2_E = 1.4426950408889634


class Form(StrEnum):
    PLAIN = "plain"
    HOPPER = "hopper"  # compute capability 9.0, BF16 queries, a latent of 512 and rope keys of 64


def mla_decode(
    query_BSHE: Tensor,
    cache_LPE: Tensor,
    pages_BQ: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    latent: int,
    schedule: DecodeSchedule | None = None,
    form: Form | None = None,
) -> Tensor:
    """Attention output in the latent space, [B, S, H, C] in the query's dtype.

    E = C + R in `query` (absorbed part first, rotated part after it); `cache` is one of `mla_cache`, in the query's
    dtype or, for BF16 queries, in FP8; `latent` is C. `pages` int32 holds the cache's page for each PAGE tokens of a
    sequence, `lengths` int32 its tokens with the queries' own: at least S, or 0 for a row of padding, whose output is
    zero. Neither pages that no sequence owns nor places beyond a sequence's length are used, whatever they hold.
    `schedule` is that of these lengths and `num_shares` shares; a step makes it once for all layers.
    `form` is the kernel's: by default the Hopper one where it can compute this, since it is the faster there.
    Raises ValueError for a page size other than PAGE, and for a form that cannot compute this.
    """
    if cache_LPE.shape[1] != PAGE:
        raise ValueError(f"pages must hold {PAGE} tokens, got {cache_LPE.shape[1]}")
    if not runs_kernels(query_BSHE):
        return mla_decode_twin(query_BSHE, cache_LPE, pages_BQ, lengths_B, scale=scale, latent=latent)
    num_sequences, num_queries, num_heads, _ = query_BSHE.shape
    if schedule is None:
        schedule = schedule_decode(lengths_B, num_shares(query_BSHE.device, num_queries, num_heads))
    slots = 2 * schedule.shares_Z4.shape[0]
    parts_2ZWC = query_BSHE.new_empty(slots, num_queries * num_heads, latent, dtype=torch.float32)
    lse_2ZW = query_BSHE.new_empty(slots, num_queries * num_heads, dtype=torch.float32)
    out_BSHC = query_BSHE.new_empty(num_sequences, num_queries, num_heads, latent)
    from teacher.kernels.attention.mla_combine_triton import combine_kernel

    if _form(form, query_BSHE, cache_LPE, latent) == Form.HOPPER:
        from teacher.kernels.attention.sm90_mla_decode import decode_kernel
    else:
        from teacher.kernels.attention.mla_decode_triton import decode_kernel
    decode_kernel(
        query_BSHE.contiguous(), entries(cache_LPE, latent), pages_BQ, lengths_B, schedule.shares_Z4, parts_2ZWC,
        lse_2ZW, out_BSHC, scale_log2=scale * LOG2_E, rows_a_program=ROWS,
    )  # fmt: skip
    combine_kernel(parts_2ZWC, lse_2ZW, out_BSHC, schedule)
    return out_BSHC


def num_shares(device: torch.device, num_queries: int, num_heads: int) -> int:
    """Shares for one wave: a program fills a multiprocessor, and every share needs one for each ROWS rows."""
    row_blocks = -(-num_queries * num_heads // ROWS)
    return max(num_multiprocessors(device) // row_blocks, 1)


def mla_decode_twin(
    query_BSHE: Tensor, cache_LPE: Tensor, pages_BQ: Tensor, lengths_B: Tensor, *, scale: float, latent: int
) -> Tensor:
    """`mla_decode` in plain torch, a sequence at a time, in FP32: [B, S, H, C] in the query's dtype."""
    num_queries = query_BSHE.shape[1]
    numbers_LPE = dequantise(cache_LPE, latent)
    outs = []
    for query_SHE, pages_Q, length in zip(query_BSHE.float(), pages_BQ, lengths_B.tolist(), strict=True):
        if not length:
            outs.append(torch.zeros_like(query_SHE[..., :latent]))
            continue
        entries_TE = numbers_LPE[pages_Q[: -(-length // PAGE)].long()].flatten(0, 1)[:length].float()
        logits_SHT = query_SHE @ entries_TE.T * scale
        last_S = length - num_queries + torch.arange(num_queries, device=logits_SHT.device)
        hidden_ST = torch.arange(length, device=logits_SHT.device)[None, :] > last_S[:, None]
        weights_SHT = logits_SHT.masked_fill(hidden_ST[:, None, :], float("-inf")).softmax(dim=-1)
        outs.append(weights_SHT @ entries_TE[:, :latent])
    return torch.stack(outs).to(query_BSHE.dtype)


def _form(asked: Form | None, query_BSHE: Tensor, cache_LPE: Tensor, latent: int) -> Form:
    widths = query_BSHE.shape[-1] == 576 and latent == 512
    kinds = query_BSHE.dtype == torch.bfloat16 and (is_fp8(cache_LPE) or cache_LPE.dtype == torch.bfloat16)
    able = widths and kinds and runs_hopper_kernels(query_BSHE.device)
    if asked == Form.HOPPER and not able:
        raise ValueError(
            "the Hopper form takes BF16 queries and latents of 512 with rope keys of 64, on compute capability 9.0 and "
            f"with Triton 3.6; got {query_BSHE.dtype}, {latent} of {query_BSHE.shape[-1]} on {query_BSHE.device}"
        )
    return asked or (Form.HOPPER if able else Form.PLAIN)
