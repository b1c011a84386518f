"""The teacher's parts of a step in plain torch operations, for a CPU; decoding reads the cache in place (`pieces`).

Shape legend: B sequences, T queries of each or of a chunk, H heads, C latent, R rope, E = C + R, P pages, S places a
page, U context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.engine.cache import gathered
from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.model.mla import LATENT_NORM_EPS
from teacher.model.rope import rotate
from teacher.models.cpu_attention import EXTENT, HeadLayout, PiecePlan, attend_pieces, causal_bias, plan_pieces
from teacher.models.latent.weights import AttentionWeights, InferenceWeights, MoEWeights


class PlainOperations:
    graphable = False
    extent = EXTENT

    def __init__(self, weights: InferenceWeights) -> None:
        self._config = weights.config
        self._tables = weights.cos, weights.sin
        self._latent = weights.config.kv_lora_rank
        self._dtype = weights.embedding.dtype
        entry = self._latent + weights.config.qk_rope_head_dim
        self.layout = HeadLayout(1, entry, keys=0, values=0, value_width=self._latent)

    def plan(self, decodes: Decodes) -> PiecePlan:
        return plan_pieces(decodes, self._dtype, self._config.num_attention_heads)

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> PiecePlan:
        raise NotImplementedError("attention on a CPU is planned by the pages' numbers")

    def rotate(self, query_MHD: Tensor, step: Step) -> None:
        rope = query_MHD[..., -self._config.qk_rope_head_dim :]
        cos, sin = (table[step.positions_M][:, None] for table in self._tables)
        rope.copy_(rotate(rope, cos, sin, interleave=self._config.rope_interleave))

    def write(self, projected_ME: Tensor, weights: AttentionWeights, step: Step, cache_PSE: Tensor) -> None:
        latent, k_rope = projected_ME.split((self._latent, self._config.qk_rope_head_dim), dim=1)
        cos, sin = (table[step.positions_M] for table in self._tables)
        k_rope = rotate(k_rope, cos, sin, interleave=self._config.rope_interleave)
        latent = F.rms_norm(latent, (self._latent,), weights.kv_norm, LATENT_NORM_EPS)
        cache_PSE.flatten(0, 1).index_copy_(0, step.slots_M, torch.cat((latent, k_rope), dim=1))

    def decode(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: PiecePlan) -> Tensor:
        out = attend_pieces(query_BTHE.flatten(1, 2), cache_PSE, plan, self.layout, scale=1.0)
        return out.unflatten(1, query_BTHE.shape[1:3])

    def absorbed(self, query_THE: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        keys = gathered(cache_PSE, chunk)[None, None]
        num_queries, num_heads, _ = query_THE.shape
        bias_TU = causal_bias(num_queries, chunk.context, query_THE.dtype).repeat_interleave(num_heads, dim=0)
        query = query_THE.flatten(0, 1)[None, None]
        out = F.scaled_dot_product_attention(query, keys, keys, attn_mask=bias_TU, scale=1.0)
        return out[0, 0].view_as(query_THE)[..., : self._latent]

    def expanded(self, query_THD: Tensor, key_UHD: Tensor, value_UHV: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query_THD, key_UHD, value_UHV))
        num_queries, context = q.shape[2], k.shape[2]
        if num_queries == context:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        else:
            bias_TU = causal_bias(num_queries, context, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_TU, scale=1.0)
        return out[0].transpose(0, 1)

    def route(self, x_MX: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor, Tensor]:
        indices_MK, gates_MK, _ = weights.router(x_MX)
        load_E = torch.bincount(indices_MK.flatten(), minlength=weights.down_EID.shape[0])
        return indices_MK, gates_MK, load_E.cumsum(0).to(torch.int32)
