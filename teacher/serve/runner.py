"""One forward pass: a prefill of whole prompts in the expanded form, or one decode step in the absorbed form.

Prompts are padded on the right, so a token's position is its index and plain causality keeps padding out of sight.

Shape legend: M tokens (rows), B prompts, T padded length, D hidden, H heads, N nope, R rope, C latent, V value,
S live slots, P positions, E experts, K experts per token, I expert intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.model.mla import LATENT_NORM_EPS
from teacher.model.rope import rotate
from teacher.serve.cache import LatentCache
from teacher.serve.weights import AttentionWeights, InferenceWeights, LayerWeights, MLPWeights, MoEWeights

Rotation = tuple[Tensor, Tensor]


class ModelRunner:
    def __init__(self, weights: InferenceWeights, num_slots: int) -> None:
        self.weights = weights
        self.config = weights.config
        self.device = weights.embedding.device
        self.cache = LatentCache(self.config, num_slots, weights.embedding.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], slots: list[list[int]]) -> Tensor:
        """Run prompts and put their latents into the cache; each may fill several slots (samples of one prompt).

        Returns logits after the last token of every prompt, FP32 [B, vocabulary].
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.cache.reserve(longest)
        ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        rotation = tuple(table[:longest].repeat(len(prompts), 1)[:, None] for table in self._tables())
        x_MD = self.weights.embedding[ids_BT.flatten()]
        targets = torch.tensor([slot for group in slots for slot in group], device=self.device)
        sources = torch.tensor([b for b, group in enumerate(slots) for _ in group], device=self.device)
        for index, layer in enumerate(self.weights.layers):
            q_nope, q_rope, entry_ME = self._project(layer.attention, x_MD, rotation)
            self.cache.entries_LSPE[index, targets, :longest] = entry_ME.unflatten(0, ids_BT.shape)[sources]
            x_MD = x_MD + self._expanded(layer.attention, q_nope, q_rope, entry_ME, ids_BT.shape)
            x_MD = x_MD + self._mlp(layer, x_MD)
        last = torch.tensor([b * longest + length - 1 for b, length in enumerate(lengths)], device=self.device)
        return self._logits(x_MD[last])

    @torch.inference_mode()
    def decode(self, token_ids: list[int], positions: list[int]) -> Tensor:
        """One token for each of the first len(token_ids) slots; returns logits FP32 [S, vocabulary]."""
        num_positions = max(positions) + 1
        self.cache.reserve(num_positions)
        slots_S = torch.arange(len(token_ids), device=self.device)
        positions_S = torch.tensor(positions, device=self.device)
        visible_SP = torch.arange(num_positions, device=self.device) <= positions_S[:, None]
        bias_S11P = torch.zeros(visible_SP.shape, dtype=self.weights.embedding.dtype, device=self.device)
        bias_S11P = bias_S11P.masked_fill_(~visible_SP, float("-inf"))[:, None, None]
        rotation = tuple(table[positions_S][:, None] for table in self._tables())
        x_SD = self.weights.embedding[torch.tensor(token_ids, device=self.device)]
        for index, layer in enumerate(self.weights.layers):
            q_nope, q_rope, entry_SE = self._project(layer.attention, x_SD, rotation)
            self.cache.write(index, slots_S, positions_S, entry_SE)
            entries_SPE = self.cache.live(index, len(token_ids), num_positions)
            x_SD = x_SD + self._absorbed(layer.attention, q_nope, q_rope, entries_SPE, bias_S11P)
            x_SD = x_SD + self._mlp(layer, x_SD)
        return self._logits(x_SD)

    def _tables(self) -> Rotation:
        return self.weights.cos, self.weights.sin

    def _project(self, w: AttentionWeights, x_MD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [M, H, N] and [M, H, R] (scaled, rotated), and what the cache keeps, [M, C + R]."""
        config = self.config
        fused = F.linear(_norm(x_MD, w.norm, config.rms_norm_eps), w.q_kv_a)
        q, latent, k_rope = fused.split(
            (
                fused.shape[1] - config.kv_lora_rank - config.qk_rope_head_dim,
                config.kv_lora_rank,
                config.qk_rope_head_dim,
            ),
            dim=1,
        )
        if w.q_b is not None:
            q = F.linear(_norm(q, w.q_norm, LATENT_NORM_EPS), w.q_b)
        q_nope, q_rope = q.unflatten(1, (config.num_attention_heads, -1)).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=2
        )
        q_rope = rotate(q_rope, *rotation, interleave=config.rope_interleave)
        k_rope = rotate(k_rope[:, None], *rotation, interleave=config.rope_interleave)[:, 0]
        return q_nope, q_rope, torch.cat((_norm(latent, w.kv_norm, LATENT_NORM_EPS), k_rope), dim=1)

    def _expanded(
        self, w: AttentionWeights, q_nope: Tensor, q_rope: Tensor, entry_ME: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        config = self.config
        heads = config.num_attention_heads
        latent, k_rope = entry_ME.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=1)
        k_nope, v = (
            F.linear(latent, w.kv_b)
            .unflatten(1, (heads, -1))
            .split((config.qk_nope_head_dim, config.v_head_dim), dim=2)
        )
        q = torch.cat((q_nope, q_rope), dim=2)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, heads, -1)), dim=2)
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in (q, k, v))
        out_BHTV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return F.linear(out_BHTV.transpose(1, 2).flatten(2).flatten(0, 1), w.o)

    def _absorbed(
        self, w: AttentionWeights, q_nope: Tensor, q_rope: Tensor, entries_SPE: Tensor, bias_S11P: Tensor
    ) -> Tensor:
        # q.(W_UK c) = (W_UK^T q).c: attention runs on the cache itself, all heads sharing one key of C + R numbers.
        q_HSC = torch.bmm(q_nope.transpose(0, 1), w.w_uk_HNC)
        q_S1HE = torch.cat((q_HSC.transpose(0, 1), q_rope), dim=2)[:, None]
        keys_S1PE = entries_SPE[:, None]
        # The values are the latent part alone; taking whole entries lets torch's fused kernel read the cache once.
        out_SHC = F.scaled_dot_product_attention(q_S1HE, keys_S1PE, keys_S1PE, attn_mask=bias_S11P, scale=1.0)[:, 0]
        out_HSV = torch.bmm(out_SHC[..., : self.config.kv_lora_rank].transpose(0, 1), w.w_uv_HCV)
        return F.linear(out_HSV.transpose(0, 1).flatten(1), w.o)

    def _mlp(self, layer: LayerWeights, x_MD: Tensor) -> Tensor:
        normed = _norm(x_MD, layer.mlp_norm, self.config.rms_norm_eps)
        if isinstance(layer.mlp, MLPWeights):
            return _swiglu(normed, layer.mlp)
        return _routed(normed, layer.mlp) + _swiglu(normed, layer.mlp.shared)

    def _logits(self, x_MD: Tensor) -> Tensor:
        return F.linear(_norm(x_MD, self.weights.norm, self.config.rms_norm_eps), self.weights.head).float()


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _swiglu(x_MD: Tensor, w: MLPWeights) -> Tensor:
    gate, up = F.linear(x_MD, w.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w.down)


def _routed(x_MD: Tensor, w: MoEWeights) -> Tensor:
    """Tokens sorted by expert, one grouped product per projection (DeepSeek-V3 eq. 12); no padding, no drop."""
    indices_MK, weights_MK, _ = w.router(x_MD)
    flat = indices_MK.flatten()
    order = flat.argsort(stable=True)
    offsets_E = torch.bincount(flat, minlength=w.down_EID.shape[0]).cumsum(0).to(torch.int32)
    rows = x_MD[order // indices_MK.shape[1]]
    gate, up = torch._grouped_mm(rows, w.gate_up_ED2I, offs=offsets_E).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, w.down_EID, offs=offsets_E)
    out_MKD = torch.empty_like(out).index_copy_(0, order, out).view(*indices_MK.shape, -1)
    return torch.bmm(weights_MK.to(out.dtype)[:, None], out_MKD).squeeze(1)
