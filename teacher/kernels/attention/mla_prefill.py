"""MLA over many queries (DeepSeek-V2 arXiv 2405.04434 s.2.1): in the expanded form, or absorbed over the cache.

Expanded, a token's latent is multiplied out to keys and values of every head (`expansion_flop`), and attention is that
of any model whose keys have 192 numbers and whose values have 128. Absorbed, nothing is multiplied out but attention
costs more (`mla_decode`, which takes any number of queries). `prefers_absorbed` says which is less work: a short chunk
over a long context is absorbed, a prompt expanded.

Several libraries compute the expanded form. Which is fastest changes with device and shape: `fastest_backend` times
them once for a class of shapes and remembers. Queries stand at the end of the context, and none sees its future.

Shape legend: B sequences, T queries, U keys (the queries' own among them), H heads, D key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache, partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from teacher.kernels.device import runs_kernels


class Backend(StrEnum):
    CUDNN = "cudnn"  # takes 192 and 128 as they are
    FLASH = "flash"  # FlashAttention 2 within torch: values padded to the keys' width
    TRITON = "triton"


class Widths(NamedTuple):
    """A layer's heads, the widths of their unrotated and rotated keys and of their values, and that of the latent."""

    num_heads: int = 128
    nope: int = 128
    rope: int = 64
    value: int = 128
    latent: int = 512


def expansion_flop(context: int, widths: Widths = Widths()) -> int:  # noqa: B008
    """FLOP that multiply out the latents of `context` tokens: 33.55e6 a token at V3's widths."""
    return 2 * widths.latent * (widths.nope + widths.value) * widths.num_heads * context


def prefers_absorbed(num_queries: int, context: int, widths: Widths = Widths()) -> bool:  # noqa: B008
    """Tell whether the absorbed form does less work for the last `num_queries` of `context` tokens of one sequence.

    It spends 2 H (2 C + R) FLOP on a pair of query and key where the expanded form spends 2 H (N + R + V): at V3's
    widths 278,528 against 81,920. It saves the expansion of the context (33.55e6 a token), and has as much to spend on
    each query, to absorb it and to bring its output back. So T queries over L tokens are absorbed below
    T = 171 L / (L + 171): 171 queries where the context is long, fewer where it is short.
    """
    pairs = num_queries * context - num_queries * (num_queries - 1) // 2
    surplus = 2 * widths.num_heads * (2 * widths.latent - widths.nope - widths.value) * pairs
    return surplus + expansion_flop(num_queries, widths) < expansion_flop(context, widths)


def mla_prefill(
    query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float, backend: Backend | None = None
) -> Tensor:
    """Causal attention of the last T of U tokens, [B, T, H, V].

    Without a `backend` the fastest for such shapes is taken, which is timed at the first call for their class:
    outside of a CUDA graph's capture. Raises ValueError if there are more queries than keys.
    """
    if query_BTHD.shape[1] > key_BUHD.shape[1]:
        raise ValueError(f"got {query_BTHD.shape[1]} queries at the end of {key_BUHD.shape[1]} tokens")
    given = query_BTHD, key_BUHD, value_BUHV
    if not runs_kernels(query_BTHD):
        return mla_prefill_twin(*given, scale=scale)
    if backend is None:
        backend = fastest_backend(*_shape_class(*given)) if query_BTHD.is_cuda else Backend.TRITON
    return _BACKENDS[backend](*given, scale=scale)


def mla_prefill_twin(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float) -> Tensor:
    """`mla_prefill` in plain torch, in FP32: [B, T, H, V] in the query's dtype."""
    num_queries, num_keys = query_BTHD.shape[1], key_BUHD.shape[1]
    logits_BHTU = torch.einsum("bthd,buhd->bhtu", query_BTHD.float(), key_BUHD.float()) * scale
    hidden_TU = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BTHD.device)
    hidden_TU = hidden_TU.triu(num_keys - num_queries + 1)
    weights_BHTU = logits_BHTU.masked_fill(hidden_TU, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhtu,buhv->bthv", weights_BHTU, value_BUHV.float()).to(query_BTHD.dtype)


def _cudnn(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float) -> Tensor:
    """Queries at the end of a context in two calls, over what precedes them and among themselves, then joined: cuDNN
    takes no such mask without reading it from memory, at half the speed."""
    q, k, v = (x.transpose(1, 2) for x in (query_BTHD, key_BUHD, value_BUHV))
    past = k.shape[2] - q.shape[2]
    if not past:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    before = _cudnn_with_lse(q, k[:, :, :past], v[:, :, :past], is_causal=False, scale=scale)
    among = _cudnn_with_lse(q, k[:, :, past:], v[:, :, past:], is_causal=True, scale=scale)
    from teacher.kernels.attention.mla_prefill_triton import join_kernel

    return join_kernel(*before, *among)


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and natural logarithm of the exponential sum [B, H, T]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _flash(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right

    width = value_BUHV.shape[-1]
    value_BUHD = F.pad(value_BUHV, (0, key_BUHD.shape[-1] - width))
    q, k, v = (x.transpose(1, 2) for x in (query_BTHD, key_BUHD, value_BUHD))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :width].transpose(1, 2)


def _triton(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor, *, scale: float) -> Tensor:
    from teacher.kernels.attention.mla_prefill_triton import prefill_kernel

    return prefill_kernel(query_BTHD, key_BUHD, value_BUHV, scale=scale)


_BACKENDS: dict[Backend, Callable[..., Tensor]] = {
    Backend.CUDNN: _cudnn,
    Backend.FLASH: _flash,
    Backend.TRITON: _triton,
}


class ShapeClass(NamedTuple):
    """Counts of tokens rounded up to powers of two; what is timed for a class serves all of it."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    key_width: int
    value_width: int
    num_queries: int
    num_keys: int


def _shape_class(query_BTHD: Tensor, key_BUHD: Tensor, value_BUHV: Tensor) -> ShapeClass:
    _, num_queries, num_heads, key_width = query_BTHD.shape
    num_keys = key_BUHD.shape[1]
    rounded = 1 << max(num_queries - 1, 127).bit_length()
    # A continued prompt stays one however small its context is.
    context = rounded if num_keys == num_queries else max(1 << (num_keys - 1).bit_length(), 2 * rounded)
    # Beyond these counts the order of the candidates does not change, and probing would take memory.
    queries = min(rounded, 4096)
    keys = queries if num_keys == num_queries else min(context, 8192)
    return ShapeClass(
        query_BTHD.device, query_BTHD.dtype, num_heads, key_width, value_BUHV.shape[-1], queries, keys
    )  # fmt: skip


@cache
def fastest_backend(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    key_width: int,
    value_width: int,
    num_queries: int,
    num_keys: int,
) -> Backend:
    """The backend whose median of five runs is least; one that refuses the shapes or the device does not compete."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (num_queries, key_width), (num_keys, key_width), (num_keys, value_width)
    given = [
        torch.randn(1, count, num_heads, width, generator=generator, dtype=dtype, device=device)
        for count, width in shapes
    ]
    times_ms: dict[Backend, float] = {}
    for backend, attend in _BACKENDS.items():
        try:
            times_ms[backend] = _time_ms(partial(attend, *given, scale=key_width**-0.5))
        except RuntimeError:  # torch's "no available kernel", or cuDNN's own refusal
            continue
    return min(times_ms, key=times_ms.__getitem__)


def _time_ms(run: Callable[[], Tensor]) -> float:
    run()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)
