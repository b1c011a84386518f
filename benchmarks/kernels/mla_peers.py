"""MLA decoding of others, as vLLM's wheel brings it: FlashMLA, FlashAttention 3, and vLLM's own Triton kernel.

What does not depend on a layer's numbers is prepared outside the timing, as vLLM does once a step for all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.case import Peer, PeerMissing
from benchmarks.kernels.peers import from_vllm
from teacher.kernels.attention.reference import DecodeSchedule

MULTIPROCESSOR_SHARE = 2  # vLLM lets a context fall into twice as many parts as there are multiprocessors
LEAST_TOKENS_A_PART = 512
FLASH_MLA = "vllm.v1.attention.ops.flashmla"
MOST_SPLITS = 32  # vLLM's default for CUDA graphs


class Decoding(NamedTuple):
    query_BSHE: Tensor
    cache_LPE: Tensor
    pages_BQ: Tensor
    lengths_B: Tensor
    schedule: DecodeSchedule  # ours


@dataclass(frozen=True)
class Prepared:
    given: Decoding
    schedule: Any
    starts_B1: Tensor | None = None


def flash_mla(device: torch.device, context: int, scale: float, latent: int, tolerance: float) -> Peer | PeerMissing:
    vllm = from_vllm(
        device,
        attend=f"{FLASH_MLA}:flash_mla_with_kvcache",
        schedule=f"{FLASH_MLA}:get_mla_metadata",
        support=f"{FLASH_MLA}:is_flashmla_dense_supported",
    )
    if isinstance(vllm, PeerMissing):
        return vllm
    supported, why = vllm.support()
    if not supported:
        return PeerMissing(str(why))

    def run(prepared: Prepared) -> Tensor:
        query, cache, pages, lengths, _ = prepared.given
        options = {"softmax_scale": scale, "causal": True, "tile_scheduler_metadata": prepared.schedule}
        return vllm.attend(query, cache.unsqueeze(2), pages, lengths, latent, **options)[0]

    def prepare(given: Decoding) -> Prepared:
        prepared = Prepared(given, vllm.schedule()[0])
        run(prepared)  # its first call makes the schedule
        return prepared

    return Peer(run, prepare=prepare, tolerance=tolerance)


def flash_attn_mla(
    device: torch.device, context: int, scale: float, latent: int, tolerance: float
) -> Peer | PeerMissing:
    vllm = from_vllm(
        device,
        attend="vllm.vllm_flash_attn:flash_attn_varlen_func",
        schedule="vllm.vllm_flash_attn:get_scheduler_metadata",
    )
    if isinstance(vllm, PeerMissing):
        return vllm

    def prepare(given: Decoding) -> Prepared:
        batch, num_queries, num_heads, width = given.query_BSHE.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_queries
        schedule = vllm.schedule(
            batch_size=batch, max_seqlen_q=num_queries, max_seqlen_k=context, num_heads_q=num_heads, num_heads_kv=1,
            headdim=width - latent, headdim_v=latent, cache_seqlens=given.lengths_B, qkv_dtype=torch.bfloat16,
            page_size=given.cache_LPE.shape[1], cu_seqlens_q=starts, causal=True, num_splits=MOST_SPLITS,
        )  # fmt: skip
        return Prepared(given, schedule, starts)

    def run(prepared: Prepared) -> Tensor:
        query, cache, pages, lengths, _ = prepared.given
        absorbed, rope = query.flatten(0, 1).split((latent, query.shape[-1] - latent), dim=-1)
        out = vllm.attend(
            q=rope, k=cache[..., latent:].unsqueeze(-2), v=cache[..., :latent].unsqueeze(-2), q_v=absorbed,
            max_seqlen_q=query.shape[1], cu_seqlens_q=prepared.starts_B1, max_seqlen_k=context, seqused_k=lengths,
            block_table=pages, softmax_scale=scale, causal=True, fa_version=3, scheduler_metadata=prepared.schedule,
            num_splits=MOST_SPLITS,
        )  # fmt: skip
        return out.unflatten(0, query.shape[:2])

    return Peer(run, prepare=prepare, tolerance=tolerance)


def triton_mla(
    device: torch.device, context: int, scale: float, latent: int, tolerance: float, num_queries: int
) -> Peer | PeerMissing:
    if num_queries != 1:
        return PeerMissing("takes one query a sequence")
    vllm = from_vllm(device, attend="vllm.v1.attention.ops.triton_decode_attention:decode_attention_fwd")
    if isinstance(vllm, PeerMissing):
        return vllm
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = 1 << (max(1, context // LEAST_TOKENS_A_PART) - 1).bit_length()
    num_splits = min(parts, MULTIPROCESSOR_SHARE * multiprocessors)
    one = torch.ones((), device=device)

    def run(given: Decoding) -> Tensor:
        query, cache, pages, lengths, _ = given
        query = query.squeeze(1)
        batch, num_heads, _ = query.shape
        out = torch.zeros(batch, num_heads, latent, dtype=query.dtype, device=device)
        lse = torch.zeros(batch, num_heads, dtype=query.dtype, device=device)
        logits = torch.empty(batch, num_heads, num_splits, latent + 1, device=device)
        entries = cache.unsqueeze(2)
        vllm.attend(
            query, entries, entries[..., :latent], out, lse, pages, lengths, logits, num_splits, scale, cache.shape[1],
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out.unsqueeze(1)

    return Peer(run, tolerance=tolerance)
