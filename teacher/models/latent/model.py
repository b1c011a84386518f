"""The teacher's architecture (MLA, DeepSeekMoE) over a step: sequences that decode beside chunks of prompts.

All rows share projections and experts, computed in the weights' own type or in FP8 (`products`). Attention is absorbed
over the cache for sequences that decode; a chunk takes the form that is less work (`prefers_absorbed`): absorbed where
it is short and its context long, else keys and values are expanded from the latents of its context, those of earlier
chunks and shared pages among them.

Shape legend: M tokens (rows), B decoding sequences, T queries of a chunk or sequence, U its context, D hidden, H heads,
N nope, R rope, C latent, E = C + R, V value, K experts a token, Z sampled rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.engine.cache import CacheShape, gathered
from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.kernels.attention.mla_prefill import Widths, prefers_absorbed
from teacher.kernels.device import has_fp8
from teacher.model.block_checkpoint import load_blocks, unfit_for_fp8
from teacher.model.checkpoint import is_fp8_folder, load_checkpoint
from teacher.model.config import read_config
from teacher.model.mla import LATENT_NORM_EPS
from teacher.model.transformer import DeepseekV3
from teacher.models.arithmetic import fp32_product
from teacher.models.latent.operations import Operations
from teacher.models.latent.products import PlainProducts, Products
from teacher.models.latent.weights import (
    AttentionWeights,
    InferenceWeights,
    LayerWeights,
    MLPWeights,
    fuse_entries,
    fuse_weights,
)


class LatentModel:
    """A `teacher.engine.architecture.Architecture`."""

    def __init__(
        self, weights: InferenceWeights, operations: Operations | None = None, products: Products | None = None
    ) -> None:
        self.weights = weights
        self.config = config = weights.config
        self.operations = operations or operations_for(weights)
        self.products = products or products_for(weights, self.operations)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.max_positions = config.max_position_embeddings
        self.cache_shape = CacheShape(config.num_hidden_layers, config.kv_lora_rank + config.qk_rope_head_dim)
        self.num_draft_layers = 0 if weights.mtp is None else 1
        self.extent = self.operations.extent
        self.graphable = self.reads_in_graphs = self.operations.graphable
        self.reads_together = False  # its kernel takes as many queries of each sequence
        self._widths = Widths(
            num_heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
        )

    @classmethod
    def of(cls, model: DeepseekV3, *, with_mtp: bool = False) -> LatentModel:
        """Lay out the weights of a model in memory."""
        return cls(fuse_weights(model, with_mtp=with_mtp))

    @classmethod
    def load(cls, folder: Path, device: torch.device, *, with_mtp: bool = False) -> LatentModel:
        """A checkpoint folder: in FP32 on a CPU; on a GPU in FP8 if folder, widths and GPU are for it, else in BF16."""
        if device.type == "cpu":
            return cls.of(load_checkpoint(folder), with_mtp=with_mtp)
        if has_fp8(device) and is_fp8_folder(folder) and unfit_for_fp8(read_config(folder)) is None:
            return cls(fuse_entries(*load_blocks(folder, device), with_mtp=with_mtp))
        return cls.of(load_checkpoint(folder, torch.bfloat16).to(device), with_mtp=with_mtp)

    @property
    def precision(self) -> str:
        """Type of the products: float32, bfloat16 or fp8."""
        return "fp8" if self.weights.is_fp8 else str(self.dtype).removeprefix("torch.")

    def plan(self, decodes: Decodes) -> Any:
        return self.operations.plan(decodes)

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> Any:
        return self.operations.plan_on_device(pages_BQ, lengths_B, num_queries)

    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        x_MD, branch_MD = self.weights.embedding[step.token_ids_M], None
        # A layer's last branch is added by the next norm: one kernel for both.
        for layer, cache_PSE in zip(self.weights.layers, entries_LPSE, strict=True):
            x_MD, branch_MD = self._layer(layer, x_MD, branch_MD, step, cache_PSE)
        return self._norm(x_MD if branch_MD is None else x_MD + branch_MD, self.weights.norm)

    def logits(self, x_ZD: Tensor) -> Tensor:
        return fp32_product(x_ZD, self.weights.head)

    def draft_hidden(self, hidden_MD: Tensor, next_ids_M: Tensor, step: Step, entries_LPSE: Tensor) -> Tensor:
        """The MTP module (DeepSeek-V3 s.2.2, eq. 21-23); what it joins, and in which order, says `MTPLayer`."""
        mtp = self.weights.mtp
        assert mtp is not None
        embedding_MD = self._norm(self.weights.embedding[next_ids_M], mtp.enorm)
        joined = torch.cat((embedding_MD, self._norm(hidden_MD, mtp.hnorm)), dim=1)
        x_MD, branch_MD = self._layer(mtp.layer, F.linear(joined, mtp.eh_proj), None, step, entries_LPSE[0])
        return self._norm(x_MD + branch_MD, mtp.norm)

    def _norm(self, x_MD: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_MD, (x_MD.shape[-1],), weight, self.config.rms_norm_eps)

    def _layer(
        self, layer: LayerWeights, x_MD: Tensor, branch_MD: Tensor | None, step: Step, cache_PSE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is still to be added to it: before the layer, and behind it."""
        x_MD, normed = self._attended(layer, x_MD, branch_MD, step, cache_PSE)
        if isinstance(layer.mlp, MLPWeights):
            return x_MD, self.products.mlp(normed, layer.mlp)
        return x_MD, self.products.experts(normed, layer.mlp)

    def _attended(
        self, layer: LayerWeights, x_MD: Tensor, branch_MD: Tensor | None, step: Step, cache_PSE: Tensor
    ) -> tuple[Tensor, Any]:
        """The residual stream behind the layer's attention, and what its MLP or experts read."""
        eps, for_experts = self.config.rms_norm_eps, not isinstance(layer.mlp, MLPWeights)
        x_MD, normed = self.products.norm(x_MD, layer.attention.norm, eps, add_MD=branch_MD)
        branch_MD = self._attention(layer.attention, normed, step, cache_PSE)
        return self.products.norm(x_MD, layer.mlp_norm, eps, add_MD=branch_MD, for_experts=for_experts)

    def _attention(self, w: AttentionWeights, normed: Any, step: Step, cache_PSE: Tensor) -> Tensor:
        """`normed` is what products read, that of the layer's input."""
        config, products = self.config, self.products
        # One product for all that reads the layer's input: the query's latent (or the query), the latent, the rope key.
        fused = products.linear(normed, w.q_kv_a)
        entry = config.kv_lora_rank + config.qk_rope_head_dim
        q, projected_ME = fused.split((fused.shape[1] - entry, entry), dim=1)
        if w.q_b is not None:
            _, q_normed = products.norm(q, w.q_norm, LATENT_NORM_EPS)
            q = products.linear(q_normed, w.q_b)
        q = q.unflatten(1, (config.num_attention_heads, -1))
        self.operations.rotate(q, step)
        # Before anything attends: a token sees itself, and a chunk its own earlier tokens, in the cache.
        self.operations.write(projected_ME, w, step, cache_PSE)
        # Rows lie in the step's order: sequences that decode, then chunks.
        outs: list[Tensor] = []
        row = 0
        for decodes in step.decodes:
            query_MHE = self._absorb(w, q[row : row + decodes.num_rows])
            query_BTHE = query_MHE.unflatten(0, (len(decodes), decodes.num_queries))
            outs.append(self._unabsorb(w, self.operations.decode(query_BTHE, cache_PSE, decodes.plan).flatten(0, 1)))
            row += decodes.num_rows
        for chunk in step.chunks:
            outs.append(self._attend_chunk(w, q[chunk.start : chunk.end], cache_PSE, chunk))
        out_MHV = torch.cat(outs) if len(outs) > 1 else outs[0]
        return products.linear(products.enter(out_MHV.flatten(1)), w.o)

    def _attend_chunk(self, w: AttentionWeights, q_THD: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        if prefers_absorbed(chunk.num_queries, chunk.context, self._widths):
            return self._unabsorb(w, self.operations.absorbed(self._absorb(w, q_THD), cache_PSE, chunk))
        config = self.config
        heads = config.num_attention_heads
        latent_UC, k_rope_UR = gathered(cache_PSE, chunk).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=1)
        kv_UHX = self.products.linear(self.products.enter(latent_UC), w.kv_b).unflatten(1, (heads, -1))
        k_nope, v = kv_UHX.split((config.qk_nope_head_dim, config.v_head_dim), dim=2)
        # All heads share the rope key.
        k_UHD = torch.cat((k_nope, k_rope_UR[:, None].expand(-1, heads, -1)), dim=2)
        return self.operations.expanded(q_THD, k_UHD, v)

    def _absorb(self, w: AttentionWeights, q_MHD: Tensor) -> Tensor:
        """q.(W_UK c) = (W_UK^T q).c: attention runs on the cache itself, all heads sharing one key of C + R numbers."""
        config = self.config
        q_nope, q_rope = q_MHD.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=2)
        # Products write into their places: putting the parts together took 40 us a layer at 128 sequences (H200).
        query_MHE = q_MHD.new_empty(*q_MHD.shape[:2], config.kv_lora_rank + config.qk_rope_head_dim)
        torch.bmm(q_nope.transpose(0, 1), w.w_uk_HNC, out=query_MHE[..., : config.kv_lora_rank].transpose(0, 1))
        query_MHE[..., config.kv_lora_rank :] = q_rope
        return query_MHE

    def _unabsorb(self, w: AttentionWeights, out_MHC: Tensor) -> Tensor:
        num_rows, num_heads, _ = out_MHC.shape
        out_MHV = out_MHC.new_empty(num_rows, num_heads, w.w_uv_HCV.shape[2])
        torch.bmm(out_MHC.transpose(0, 1), w.w_uv_HCV, out=out_MHV.transpose(0, 1))
        return out_MHV


def operations_for(weights: InferenceWeights) -> Operations:
    """Choose by where the weights are: kernels on a GPU, plain torch on a CPU."""
    if weights.embedding.is_cuda:
        from teacher.models.latent.gpu import KernelOperations

        return KernelOperations(weights)
    from teacher.models.latent.plain import PlainOperations

    return PlainOperations(weights)


def products_for(weights: InferenceWeights, operations: Operations) -> Products:
    """Choose by the weights' type: FP8, or their own."""
    if weights.is_fp8:
        from teacher.models.latent.fp8_products import Fp8Products

        return Fp8Products(weights.config)
    return PlainProducts(operations)
