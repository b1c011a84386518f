"""A model's weights laid out for inference: projections with one input fused, latents ready to be absorbed.

MLA decodes in the absorbed form (DeepSeek-V2 s.2.1.2): W_UK moves to the query, W_UV behind the attention, so that the
cache is read as it is. Both stay separate factors: multiplied out with their neighbours they would cost more. They stay
in BF16 where all else is FP8.

Shape legend: D hidden, H heads, N nope, R rope, V value, C latent, E routed experts, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher.kernels.moe.reference import ExpertWeights
from teacher.model.block_checkpoint import Entry
from teacher.model.config import DeepseekV3Config
from teacher.model.fp8 import BlockMatrix, dequantise_blocks
from teacher.model.rope import RotaryTable, softmax_scale
from teacher.model.router import Router
from teacher.model.transformer import DeepseekV3


@dataclass(frozen=True)
class AttentionWeights:
    """`q_kv_a` maps the hidden state to [query (latent), latent, rope key]; the softmax scale is inside the queries."""

    norm: Tensor
    q_kv_a: Entry
    q_norm: Tensor | None
    q_b: Entry | None
    kv_norm: Tensor
    w_uk_HNC: Tensor
    w_uv_HCV: Tensor
    kv_b: Entry
    o: Entry


@dataclass(frozen=True)
class MLPWeights:
    """A SwiGLU with gate over up in one matrix."""

    gate_up: Entry
    down: Entry


@dataclass(frozen=True)
class MoEWeights:
    """Experts transposed, [E, D, 2I] and [E, I, D]: the small products of a decode step run twice as fast that way."""

    router: Router
    gate_up_ED2I: Tensor
    down_EID: Tensor
    shared: MLPWeights


@dataclass(frozen=True)
class Fp8MoEWeights:
    """Experts as checkpoints hold them; the router in BF16, its bias FP32."""

    router_ED: Tensor
    bias_E: Tensor
    experts: ExpertWeights
    shared: MLPWeights


@dataclass(frozen=True)
class LayerWeights:
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MLPWeights | MoEWeights | Fp8MoEWeights


@dataclass(frozen=True)
class MTPWeights:
    """A multi-token prediction module (DeepSeek-V3 s.2.2): norms of embedding and hidden state, what joins them, a
    layer, and the norm before the main model's head. `eh_proj` is in FP8 nowhere."""

    enorm: Tensor
    hnorm: Tensor
    eh_proj: Tensor
    layer: LayerWeights
    norm: Tensor


@dataclass(frozen=True)
class InferenceWeights:
    config: DeepseekV3Config
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    mtp: MTPWeights | None = None

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.layers[0].attention.o, BlockMatrix)


def fuse_weights(model: DeepseekV3, *, with_mtp: bool = False) -> InferenceWeights:
    """Lay out a model's weights, as `fuse_entries` does."""
    return fuse_entries(model.config, model.state_dict(), with_mtp=with_mtp)


@torch.no_grad()
def fuse_entries(config: DeepseekV3Config, entries: Mapping[str, Entry], *, with_mtp: bool = False) -> InferenceWeights:
    """Lay out the main model's weights, and with `with_mtp` those of the MTP module where there is one. Fused matrices
    are copies.

    `entries` are those of the model's state_dict, or of `load_blocks`.
    """
    embedding = _tensor(entries, "model.embed_tokens.weight")
    with torch.device(embedding.device):
        rotary = RotaryTable(config)
    return InferenceWeights(
        config=config,
        embedding=embedding,
        layers=tuple(_Layer(config, entries, index).weights() for index in range(config.num_hidden_layers)),
        norm=_tensor(entries, "model.norm.weight"),
        head=_tensor(entries, "lm_head.weight"),
        cos=rotary.cos,
        sin=rotary.sin,
        mtp=_mtp(config, entries) if with_mtp and config.num_nextn_predict_layers else None,
    )


def _mtp(config: DeepseekV3Config, entries: Mapping[str, Entry]) -> MTPWeights:
    index = config.num_hidden_layers
    names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    enorm, hnorm, eh_proj, norm = (_tensor(entries, f"model.layers.{index}.{name}.weight") for name in names)
    return MTPWeights(enorm, hnorm, eh_proj, _Layer(config, entries, index).weights(), norm)


class _Layer:
    """One decoder layer's entries."""

    def __init__(self, config: DeepseekV3Config, entries: Mapping[str, Entry], index: int) -> None:
        self._config = config
        self._entries = entries
        self._prefix = f"model.layers.{index}."
        self._is_moe = config.is_moe(index)

    def weights(self) -> LayerWeights:
        moe = self._moe() if self._is_moe else self._mlp("mlp.")
        return LayerWeights(self._attention(), self._tensor("post_attention_layernorm.weight"), moe)

    def _entry(self, name: str) -> Entry:
        return self._entries[self._prefix + name]

    def _tensor(self, name: str) -> Tensor:
        return _tensor(self._entries, self._prefix + name)

    def _mlp(self, stem: str) -> MLPWeights:
        gate, up, down = (self._entry(f"{stem}{name}_proj.weight") for name in ("gate", "up", "down"))
        return MLPWeights(_stacked(gate, up), down)

    def _moe(self) -> MoEWeights | Fp8MoEWeights:
        shared = self._mlp("mlp.shared_experts.")
        gate_up, down = self._entry("mlp.experts.gate_up_proj"), self._entry("mlp.experts.down_proj")
        router, bias = self._tensor("mlp.gate.weight"), self._tensor("mlp.gate.e_score_correction_bias")
        if isinstance(gate_up, BlockMatrix):
            return Fp8MoEWeights(router, bias, ExpertWeights(*gate_up, *down), shared)
        with torch.device("meta"):
            module = Router(self._config)
        module.load_state_dict({"weight": router, "e_score_correction_bias": bias}, assign=True)
        return MoEWeights(module, gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous(), shared)

    def _attention(self) -> AttentionWeights:
        config = self._config
        kv_b = self._entry("self_attn.kv_b_proj.weight")
        numbers = dequantise_blocks(*kv_b).to(torch.bfloat16) if isinstance(kv_b, BlockMatrix) else kv_b
        kv_b_HXC = numbers.unflatten(0, (config.num_attention_heads, -1))
        k_HNC, v_HVC = kv_b_HXC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        low_rank, scale = config.q_lora_rank is not None, softmax_scale(config)
        q_in = self._entry("self_attn.q_a_proj.weight" if low_rank else "self_attn.q_proj.weight")
        if not low_rank:
            q_in = _scaled(q_in, scale)
        return AttentionWeights(
            norm=self._tensor("input_layernorm.weight"),
            q_kv_a=_stacked(q_in, self._entry("self_attn.kv_a_proj_with_mqa.weight")),
            q_norm=self._tensor("self_attn.q_a_layernorm.weight") if low_rank else None,
            q_b=_scaled(self._entry("self_attn.q_b_proj.weight"), scale) if low_rank else None,
            kv_norm=self._tensor("self_attn.kv_a_layernorm.weight"),
            w_uk_HNC=k_HNC.contiguous(),
            w_uv_HCV=v_HVC.transpose(1, 2).contiguous(),
            kv_b=kv_b,
            o=self._entry("self_attn.o_proj.weight"),
        )


def _tensor(entries: Mapping[str, Entry], name: str) -> Tensor:
    entry = entries[name]
    assert isinstance(entry, Tensor)
    return entry


def _stacked(upper: Entry, lower: Entry) -> Entry:
    """One matrix over another with as many columns; of block matrices the upper one must be whole blocks high."""
    if isinstance(upper, Tensor):
        return torch.cat((upper, lower))
    # As bytes: torch joins no E4M3 tensors on some of its devices.
    values = torch.cat((upper.values.view(torch.uint8), lower.values.view(torch.uint8)))
    return BlockMatrix(values.view(upper.values.dtype), torch.cat((upper.scale_inv, lower.scale_inv)))


def _scaled(matrix: Entry, factor: float) -> Entry:
    if isinstance(matrix, Tensor):
        return matrix * factor
    return BlockMatrix(matrix.values, matrix.scale_inv * factor)
