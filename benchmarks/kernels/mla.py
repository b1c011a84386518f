"""Cases of MLA at DeepSeek-V3's widths: absorbed over the paged latent cache, and expanded over a prompt.

Shape legend: B sequences, S queries each, T tokens of context, H heads, E = 576 latent and rope (656 bytes in FP8),
L pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Peer, PeerMissing, Work, relative_error
from benchmarks.kernels.inputs import normal
from benchmarks.kernels.mla_peers import Decoding, flash_attn_mla, flash_mla, triton_mla
from teacher.kernels.attention.mla_cache import PAGE, quantise_entries
from teacher.kernels.attention.mla_decode import mla_decode, mla_decode_twin, num_shares
from teacher.kernels.attention.mla_prefill import Backend, Widths, mla_prefill, mla_prefill_twin
from teacher.kernels.attention.mla_schedule import schedule_decode

WIDTHS = Widths()
LATENT, ROPE = WIDTHS.latent, WIDTHS.rope
SCALE = (WIDTHS.nope + ROPE) ** -0.5  # of the widths before absorption
SHAPES = ((128, 4_096), (32, 4_096), (8, 16_384), (1, 65_536), (1, 4_096))
TOY_SHAPES, TOY_HEADS = ((2, 130), (1, 64)), 8
PROMPTS = ((1, 4_096), (4, 2_048))
JUDGED_HEADS = 8  # of a prompt: all heads' logits in FP32 are tens of gigabytes
ENTRIES_AT_ONCE = 65_536
# BF16 operands: the weights of the softmax are rounded before their product with the values.
TOLERANCE = 5e-3


def cases(*, toy: bool) -> Iterator[Case]:
    num_heads = TOY_HEADS if toy else WIDTHS.num_heads
    for fp8 in (False, True):
        for batch, context in TOY_SHAPES if toy else SHAPES:
            for num_queries in (1, 2):
                kernel = "mla_decode FP8 cache" if fp8 else "mla_decode BF16"
                shape = f"{batch} x {context}, {num_queries} quer{'y' if num_queries == 1 else 'ies'}"
                yield Case(kernel, shape, partial(_decode, batch, context, num_queries, num_heads, fp8))
    for batch, length in ((2, 70),) if toy else PROMPTS:
        yield Case("mla_prefill", f"{batch} x {length}", partial(_prefill, batch, length, num_heads))


def _decode(batch: int, context: int, num_queries: int, num_heads: int, fp8: bool, device: torch.device) -> Work:
    width = LATENT + ROPE
    pages_a_sequence = -(-context // PAGE)
    given_and_made = 2 * batch * num_queries * num_heads * (width + LATENT)
    size = batch * context * (LATENT + 2 * ROPE + 4 if fp8 else 2 * width) + given_and_made

    def make(seed: int) -> Decoding:
        cache_LPE = normal(device, seed, batch * pages_a_sequence, PAGE, width)
        if fp8:
            parts = cache_LPE.flatten(0, 1).split(ENTRIES_AT_ONCE)
            entries = [quantise_entries(part[:, :LATENT].float(), part[:, LATENT:]) for part in parts]
            cache_LPE = torch.cat(entries).unflatten(0, (-1, PAGE))
        order = torch.randperm(len(cache_LPE), device=device, dtype=torch.int32)
        query = normal(device, seed + 1_000, batch, num_queries, num_heads, width)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        shares = num_shares(device, num_queries, num_heads) if device.type == "cuda" else 1
        schedule = schedule_decode(lengths, shares)  # a step makes it once for all its layers
        return Decoding(query, cache_LPE, order.view(batch, pages_a_sequence), lengths, schedule)

    def run(given: Decoding) -> Tensor:
        return mla_decode(*given[:4], scale=SCALE, latent=LATENT, schedule=given.schedule)

    given = device, context, SCALE, LATENT, TOLERANCE

    def peers() -> dict[str, Peer | PeerMissing]:
        return {
            "FlashMLA": flash_mla(*given),
            "FlashAttention 3": flash_attn_mla(*given),
            "vLLM Triton": triton_mla(*given, num_queries),
        }

    return Work(
        run,
        make,
        error=lambda got, given: relative_error(got, mla_decode_twin(*given[:4], scale=SCALE, latent=LATENT)),
        tolerance=TOLERANCE,
        size_bytes=size,
        flop=2 * batch * num_queries * num_heads * context * (width + LATENT),
        product="bf16",
        peers=dict if fp8 else peers,  # the FP8 caches of others have other formats
    )


def _prefill(batch: int, length: int, num_heads: int, device: torch.device) -> Work:
    widths = WIDTHS.nope + ROPE, WIDTHS.nope + ROPE, WIDTHS.value

    def make(seed: int) -> tuple[Tensor, ...]:
        return tuple(normal(device, 3 * seed + n, batch, length, num_heads, width) for n, width in enumerate(widths))

    def error(got: Tensor, given: tuple[Tensor, ...]) -> float:
        judged = (x[:, :, :JUDGED_HEADS] for x in given)
        return relative_error(got[:, :, :JUDGED_HEADS], mla_prefill_twin(*judged, scale=SCALE))

    def with_backend(backend: Backend) -> Peer:
        return Peer(lambda given: mla_prefill(*given, scale=SCALE, backend=backend), tolerance=TOLERANCE)

    return Work(
        run=lambda given: mla_prefill(*given, scale=SCALE),
        make=make,
        error=error,
        tolerance=TOLERANCE,
        size_bytes=2 * batch * length * num_heads * (sum(widths) + WIDTHS.value),
        flop=batch * num_heads * length * (length + 1) * (widths[0] + WIDTHS.value),
        product="bf16",
        peers=lambda: {each.value: with_backend(each) for each in Backend} if device.type == "cuda" else {},
    )
