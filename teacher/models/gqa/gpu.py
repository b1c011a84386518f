"""Grouped-query attention by the project's kernels (`teacher.kernels`), for a GPU; a prompt's chunk by torch's SDPA,
or, of several prompts in one graph, by the project's too.

Heads of a width that the kernels do not take are computed by the twins in plain torch, as is everything on GPUs without
FP8, on which no kernel was tried: right, and slow.

Shape legend: as in `teacher.models.gqa.operations`; Q pages a sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from teacher.engine.cache import gathered
from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.kernels.attention.gqa_cache import place_heads
from teacher.kernels.attention.gqa_decode import fits, gqa_decode, gqa_decode_twin, num_shares
from teacher.kernels.attention.gqa_prefill import gqa_prefill
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import HeadNorms, PackedQueries, place_heads_twin
from teacher.kernels.device import has_fp8
from teacher.models.gqa.weights import GqaLayer, GqaWeights
from teacher.models.paged_plan import PagedPlan


class GqaKernels:
    extent = 1

    def __init__(self, weights: GqaWeights) -> None:
        config = self._config = weights.config
        self._rotation = weights.cos, weights.sin
        self._device = weights.embedding.device
        self._fits = fits(config.head_dim)
        self._scale = config.head_dim**-0.5

    @property
    def graphable(self) -> bool:
        return self._fits and has_fp8(self._device)

    def plan(self, decodes: Decodes) -> PagedPlan:
        return self.plan_on_device(*decodes.tables(self._device))

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor) -> PagedPlan:
        if not self._fits:
            return PagedPlan(pages_BQ, lengths_B, None)
        shares = num_shares(self._device, self._config.num_key_value_heads)
        return PagedPlan(pages_BQ, lengths_B, schedule_decode(lengths_B, shares))

    def place(self, qkv_MX: Tensor, layer: GqaLayer, step: Step, cache_PSE: Tensor) -> Tensor:
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, self._config.rms_norm_eps)
        put = place_heads if self._fits else place_heads_twin
        given = qkv_MX, norms, self._rotation, step.positions_M, step.slots_M, cache_PSE
        return put(*given, num_heads=self._config.num_attention_heads)

    def decode(self, query_BHA: Tensor, cache_PSE: Tensor, plan: PagedPlan) -> Tensor:
        given = query_BHA, cache_PSE, plan.pages_BQ, plan.lengths_B
        kind = {"scale": self._scale, "kv_heads": self._config.num_key_value_heads}
        if not self._fits:
            return gqa_decode_twin(*given, **kind)
        return gqa_decode(*given, **kind, schedule=plan.schedule)

    def read_together(self, query_MHA: Tensor, cache_PSE: Tensor, packed: PackedQueries) -> Tensor:
        kind = {"scale": self._scale, "kv_heads": self._config.num_key_value_heads}
        return gqa_prefill(query_MHA, cache_PSE, packed, **kind)

    def read(self, query_THA: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        num_queries, _, width = query_THA.shape
        entries = gathered(cache_PSE, chunk).unflatten(1, (2, self._config.num_key_value_heads, width))
        keys, values = entries.permute(1, 2, 0, 3)[:, None]
        query = query_THA.transpose(0, 1)[None]
        mask = causal_lower_right(num_queries, chunk.context)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale, enable_gqa=True)
        return out[0].transpose(0, 1)
