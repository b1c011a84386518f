"""Cases of absorbed MLA over the paged latent cache, at DeepSeek-V3's widths.

Shape legend: B sequences, S queries each, T tokens of context, H heads, E = 576 latent and rope, L pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Peer, PeerMissing, Work, relative_error
from benchmarks.kernels.inputs import input_sets, normal
from benchmarks.kernels.mla_peers import Decoding, flash_attn_mla, flash_mla, triton_mla
from teacher.kernels.mla_decode import PAGE, mla_decode, mla_decode_twin

HEADS, LATENT, ROPE = 128, 512, 64
SCALE = (128 + ROPE) ** -0.5  # of the widths before absorption
SHAPES = ((128, 4_096), (32, 4_096), (8, 16_384), (1, 65_536), (1, 4_096))
TOY_SHAPES = ((2, 130), (1, 64))
# BF16 operands: the weights of the softmax are rounded before their product with the values.
TOLERANCE = 5e-3


def cases(*, toy: bool) -> Iterator[Case]:
    for batch, context in TOY_SHAPES if toy else SHAPES:
        for num_queries in (1, 2):
            shape = f"{batch} x {context}, {num_queries} quer{'y' if num_queries == 1 else 'ies'}"
            yield Case("mla_decode BF16", shape, partial(_decode, batch, context, num_queries, 8 if toy else HEADS))


def _decode(batch: int, context: int, num_queries: int, num_heads: int, device: torch.device) -> Work:
    width = LATENT + ROPE
    pages_a_sequence = -(-context // PAGE)
    size = batch * (context * 2 * width + 2 * num_queries * num_heads * (width + LATENT))

    def make(seed: int) -> Decoding:
        cache_LPE = normal(device, seed, batch * pages_a_sequence, PAGE, width)
        order = torch.randperm(len(cache_LPE), device=device, dtype=torch.int32)
        query = normal(device, seed + 1_000, batch, num_queries, num_heads, width)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        return Decoding(query, cache_LPE, order.view(batch, pages_a_sequence), lengths)

    def run(given: Decoding) -> Tensor:
        return mla_decode(*given, scale=SCALE, latent=LATENT)

    peers: dict[str, Peer | PeerMissing] = {
        "FlashMLA": flash_mla(device, context, SCALE, LATENT, TOLERANCE),
        "FlashAttention 3": flash_attn_mla(device, context, SCALE, LATENT, TOLERANCE),
        "vLLM Triton": triton_mla(device, context, SCALE, LATENT, TOLERANCE, num_queries),
    }
    return Work(
        run,
        input_sets(make, size, device),
        error=lambda got, given: relative_error(got, mla_decode_twin(*given, scale=SCALE, latent=LATENT)),
        tolerance=TOLERANCE,
        size_bytes=size,
        flop=2 * batch * num_queries * num_heads * context * (width + LATENT),
        product="bf16",
        peers=peers,
    )
