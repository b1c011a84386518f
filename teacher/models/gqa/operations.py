"""The seam between grouped-query attention and how it is computed: plain torch operations on a CPU, kernels on a GPU.

An entry of the cache is a token's keys, one head after another, and then its values.

Shape legend: M rows, B decoding sequences, T queries of a chunk, U its context, H heads, J key-value heads, A width of
a head, E = 2 * J * A, P pages, S places a page.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from teacher.engine.cache import gathered
from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.kernels.attention.reference import PackedQueries
from teacher.model.rope import rotate
from teacher.models.cpu_attention import EXTENT, HeadLayout, PiecePlan, attend_pieces, causal_bias, plan_pieces
from teacher.models.gqa.weights import GqaLayer, GqaWeights


class GqaOperations(Protocol):
    graphable: bool  # nothing of a step of decoding sequences waits for the device, or depends on its numbers
    extent: int  # pages of one sequence that lie together, where the block manager can have it so

    def plan(self, decodes: Decodes) -> Any:
        """Make what `decode` needs besides, once a step for all layers."""
        ...

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor) -> Any:
        """Make the same from int32 tensors on the device, which stay there; zero lengths are padding."""
        ...

    def place(self, qkv_MX: Tensor, layer: GqaLayer, step: Step, cache_PSE: Tensor) -> Tensor:
        """Norm (where the model does) and rotate queries and keys, put keys and values where the step says; queries,
        [M, H, A]."""
        ...

    def decode(self, query_BHA: Tensor, cache_PSE: Tensor, plan: Any) -> Tensor:
        """Attention of one query a sequence, [B, H, A]."""
        ...

    def read(self, query_THA: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        """Causal attention of a chunk, [T, H, A]."""
        ...

    def read_together(self, query_MHA: Tensor, cache_PSE: Tensor, packed: PackedQueries) -> Tensor:
        """Causal attention of several prompts' rows, [M, H, A]. Only what is `graphable` needs it."""
        ...


def gqa_operations_for(weights: GqaWeights) -> GqaOperations:
    """Choose by where the weights are: kernels on a GPU, plain torch on a CPU."""
    if weights.embedding.is_cuda:
        from teacher.models.gqa.gpu import GqaKernels

        return GqaKernels(weights)
    return PlainGqa(weights)


class PlainGqa:
    graphable = False
    extent = EXTENT

    def __init__(self, weights: GqaWeights) -> None:
        config = self._config = weights.config
        self._tables = weights.cos, weights.sin
        self._dtype = weights.embedding.dtype
        width, kv_heads = config.head_dim, config.num_key_value_heads
        self.layout = HeadLayout(kv_heads, width, keys=0, values=kv_heads * width, value_width=width)
        self.scale = width**-0.5

    def plan(self, decodes: Decodes) -> PiecePlan:
        return plan_pieces(decodes, self._dtype, self._config.num_attention_heads)

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor) -> PiecePlan:
        raise NotImplementedError("attention on a CPU is planned by the pages' numbers")

    def read_together(self, query_MHA: Tensor, cache_PSE: Tensor, packed: PackedQueries) -> Tensor:
        raise NotImplementedError("prompts are read one by one on a CPU")

    def place(self, qkv_MX: Tensor, layer: GqaLayer, step: Step, cache_PSE: Tensor) -> Tensor:
        return place_plainly(qkv_MX, layer, self._config, self._tables, step, cache_PSE)

    def decode(self, query_BHA: Tensor, cache_PSE: Tensor, plan: PiecePlan) -> Tensor:
        return attend_pieces(query_BHA, cache_PSE, plan, self.layout, self.scale)

    def read(self, query_THA: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        """A key-value head is a batch of its own, its group of queries shares it without a copy."""
        num_queries, num_heads, width = query_THA.shape
        kv_heads, context = self.layout.num_kv_heads, chunk.context
        group = num_heads // kv_heads
        entries = gathered(cache_PSE, chunk).unflatten(1, (2, kv_heads, width))
        keys, values = entries.permute(1, 2, 0, 3)[:, :, None].expand(-1, -1, group, -1, -1)
        query = query_THA.view(num_queries, kv_heads, group, width).permute(1, 2, 0, 3)
        if num_queries == context:
            out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=self.scale)
        else:
            bias_TU = causal_bias(num_queries, context, query.dtype)
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias_TU, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, width)


def place_plainly(
    qkv_MX: Tensor,
    layer: GqaLayer,
    config: Any,
    tables: tuple[Tensor, Tensor],
    step: Step,
    cache_PSE: Tensor,
) -> Tensor:
    """`GqaOperations.place` in torch operations; needs slots of zero or more."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, keys, values = qkv_MX.split((heads * width, kv_heads * width, kv_heads * width), dim=1)
    query, keys = query.unflatten(1, (heads, width)), keys.unflatten(1, (kv_heads, width))
    if layer.q_norm is not None:
        query = F.rms_norm(query, (width,), layer.q_norm, config.rms_norm_eps)
        keys = F.rms_norm(keys, (width,), layer.k_norm, config.rms_norm_eps)
    cos, sin = (table[step.positions_M][:, None] for table in tables)
    keys = rotate(keys, cos, sin, interleave=False).flatten(1)
    flat_NE = cache_PSE.flatten(0, 1)
    flat_NE[:, : kv_heads * width].index_copy_(0, step.slots_M, keys)
    flat_NE[:, kv_heads * width :].index_copy_(0, step.slots_M, values)
    return rotate(query, cos, sin, interleave=False)
