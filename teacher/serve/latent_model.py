"""The teacher's architecture (MLA, DeepSeekMoE) over a step: sequences that decode beside chunks of prompts.

All rows share projections and experts. Attention is absorbed over the cache for sequences that decode; a chunk takes
the form that is less work (`prefers_absorbed`): absorbed where it is short and its context long, else keys and values
are expanded from the latents of its context, those of earlier chunks and shared pages among them.

Shape legend: M tokens (rows), B decoding sequences, T queries of a chunk, U its context, D hidden, H heads, N nope,
R rope, C latent, E = C + R, V value, K experts a token, Z sampled rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.mla_prefill import Widths, prefers_absorbed
from teacher.model.mla import LATENT_NORM_EPS
from teacher.model.transformer import DeepseekV3
from teacher.serve.cache import CacheShape
from teacher.serve.operations import Operations, gathered, operations_for
from teacher.serve.step import Decodes, PromptChunk, Step
from teacher.serve.weights import AttentionWeights, InferenceWeights, LayerWeights, MLPWeights, MoEWeights, fuse_weights


class LatentModel:
    """A `teacher.serve.architecture.Architecture`."""

    def __init__(self, weights: InferenceWeights, operations: Operations | None = None) -> None:
        self.weights = weights
        self.config = config = weights.config
        self.operations = operations or operations_for(weights)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.max_positions = config.max_position_embeddings
        self.cache_shape = CacheShape(config.num_hidden_layers, config.kv_lora_rank + config.qk_rope_head_dim)
        self.extent = self.operations.extent
        self._widths = Widths(
            num_heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
        )

    @classmethod
    def of(cls, model: DeepseekV3) -> LatentModel:
        return cls(fuse_weights(model))

    def plan(self, decodes: Decodes) -> Any:
        return self.operations.plan(decodes)

    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        x_MD = self.weights.embedding[step.token_ids_M]
        for layer, cache_PSE in zip(self.weights.layers, entries_LPSE, strict=True):
            x_MD = self._layer(layer, x_MD, step, cache_PSE)
        return x_MD

    def logits(self, x_ZD: Tensor) -> Tensor:
        return F.linear(_norm(x_ZD, self.weights.norm, self.config.rms_norm_eps), self.weights.head).float()

    def _layer(self, layer: LayerWeights, x_MD: Tensor, step: Step, cache_PSE: Tensor) -> Tensor:
        x_MD = x_MD + self._attention(layer.attention, x_MD, step, cache_PSE)
        return x_MD + self._mlp(layer, x_MD)

    def _attention(self, w: AttentionWeights, x_MD: Tensor, step: Step, cache_PSE: Tensor) -> Tensor:
        config = self.config
        fused = F.linear(_norm(x_MD, w.norm, config.rms_norm_eps), w.q_kv_a)
        entry = config.kv_lora_rank + config.qk_rope_head_dim
        q, projected_ME = fused.split((fused.shape[1] - entry, entry), dim=1)
        if w.q_b is not None:
            q = F.linear(_norm(q, w.q_norm, LATENT_NORM_EPS), w.q_b)
        q = q.unflatten(1, (config.num_attention_heads, -1))
        self.operations.rotate(q, step)
        self.operations.write(projected_ME, w, step, cache_PSE)
        outs: list[Tensor] = []
        if num_decodes := len(step.decodes):
            query_BHE = self._absorb(w, q[:num_decodes])
            outs.append(self._unabsorb(w, self.operations.decode(query_BHE, cache_PSE, step.plan)))
        for chunk in step.chunks:
            outs.append(self._attend_chunk(w, q[chunk.start : chunk.end], cache_PSE, chunk))
        out_MHV = torch.cat(outs) if len(outs) > 1 else outs[0]
        return F.linear(out_MHV.flatten(1), w.o)

    def _attend_chunk(self, w: AttentionWeights, q_THD: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        if prefers_absorbed(chunk.num_queries, chunk.context, self._widths):
            return self._unabsorb(w, self.operations.absorbed(self._absorb(w, q_THD), cache_PSE, chunk))
        config = self.config
        heads = config.num_attention_heads
        latent_UC, k_rope_UR = gathered(cache_PSE, chunk).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=1)
        kv_UHX = F.linear(latent_UC, w.kv_b).unflatten(1, (heads, -1))
        k_nope, v = kv_UHX.split((config.qk_nope_head_dim, config.v_head_dim), dim=2)
        k_UHD = torch.cat((k_nope, k_rope_UR[:, None].expand(-1, heads, -1)), dim=2)
        return self.operations.expanded(q_THD, k_UHD, v)

    def _absorb(self, w: AttentionWeights, q_MHD: Tensor) -> Tensor:
        """q.(W_UK c) = (W_UK^T q).c: attention runs on the cache itself, all heads sharing one key of C + R numbers."""
        q_nope, q_rope = q_MHD.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=2)
        q_HMC = torch.bmm(q_nope.transpose(0, 1), w.w_uk_HNC)
        return torch.cat((q_HMC.transpose(0, 1), q_rope), dim=2)

    def _unabsorb(self, w: AttentionWeights, out_MHC: Tensor) -> Tensor:
        return torch.bmm(out_MHC.transpose(0, 1), w.w_uv_HCV).transpose(0, 1)

    def _mlp(self, layer: LayerWeights, x_MD: Tensor) -> Tensor:
        normed = _norm(x_MD, layer.mlp_norm, self.config.rms_norm_eps)
        if isinstance(layer.mlp, MLPWeights):
            return _swiglu(normed, layer.mlp)
        return self._routed(normed, layer.mlp) + _swiglu(normed, layer.mlp.shared)

    def _routed(self, x_MD: Tensor, w: MoEWeights) -> Tensor:
        """Tokens sorted by expert, one grouped product per projection (DeepSeek-V3 eq. 12); no padding, no drop."""
        indices_MK, gates_MK, ends_E = self.operations.route(x_MD, w)
        order = indices_MK.flatten().argsort(stable=True)
        rows = x_MD[order // indices_MK.shape[1]]
        gate, up = torch._grouped_mm(rows, w.gate_up_ED2I, offs=ends_E).chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(gate) * up, w.down_EID, offs=ends_E)
        out_MKD = torch.empty_like(out).index_copy_(0, order, out).view(*indices_MK.shape, -1)
        return torch.bmm(gates_MK.to(out.dtype)[:, None], out_MKD).squeeze(1)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _swiglu(x_MD: Tensor, w: MLPWeights) -> Tensor:
    gate, up = F.linear(x_MD, w.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w.down)
