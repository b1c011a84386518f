"""A model's weights laid out for inference: projections with one input fused, latents ready to be absorbed.

MLA decodes in the absorbed form (DeepSeek-V2 s.2.1.2): W_UK moves to the query, W_UV behind the attention, so that the
cache is read as it is. Both stay separate factors: multiplied out with their neighbours they would cost more.

Shape legend: D hidden, H heads, N nope, R rope, V value, C latent, E routed experts, I expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teacher.model.config import DeepseekV3Config
from teacher.model.layers import DecoderLayer, DeepseekMoE, DenseMLP
from teacher.model.mla import MLA
from teacher.model.transformer import DeepseekV3


@dataclass(frozen=True)
class AttentionWeights:
    """`q_kv_a` maps the hidden state to [query (latent), latent, rope key]; the softmax scale is inside the queries."""

    norm: Tensor
    q_kv_a: Tensor
    q_norm: Tensor | None
    q_b: Tensor | None
    kv_norm: Tensor
    w_uk_HNC: Tensor
    w_uv_HCV: Tensor
    kv_b: Tensor
    o: Tensor


@dataclass(frozen=True)
class MLPWeights:
    """A SwiGLU with gate over up in one matrix."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class MoEWeights:
    """Experts transposed, [E, D, 2I] and [E, I, D]: the small products of a decode step run twice as fast that way."""

    router: torch.nn.Module
    gate_up_ED2I: Tensor
    down_EID: Tensor
    shared: MLPWeights


@dataclass(frozen=True)
class LayerWeights:
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True)
class InferenceWeights:
    config: DeepseekV3Config
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor


@torch.no_grad()
def fuse_weights(model: DeepseekV3) -> InferenceWeights:
    """Lay out the main model's weights (the MTP module is not used here). Fused matrices are copies."""
    config = model.config
    return InferenceWeights(
        config=config,
        embedding=model.model.embed_tokens.weight.detach(),
        layers=tuple(_layer(layer) for layer in model.model.layers[: config.num_hidden_layers]),
        norm=model.model.norm.weight.detach(),
        head=model.lm_head.weight.detach(),
        cos=model.rotary.cos,
        sin=model.rotary.sin,
    )


def _layer(layer: DecoderLayer) -> LayerWeights:
    mlp: MLPWeights | MoEWeights
    if isinstance(layer.mlp, DeepseekMoE):
        mlp = MoEWeights(
            router=layer.mlp.gate,
            gate_up_ED2I=layer.mlp.experts.gate_up_proj.transpose(1, 2).contiguous(),
            down_EID=layer.mlp.experts.down_proj.transpose(1, 2).contiguous(),
            shared=_swiglu(layer.mlp.shared_experts),
        )
    else:
        mlp = _swiglu(layer.mlp)
    return LayerWeights(
        attention=_attention(layer.self_attn, layer.input_layernorm.weight.detach()),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        mlp=mlp,
    )


def _swiglu(mlp: DenseMLP) -> MLPWeights:
    return MLPWeights(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight.detach())


def _attention(mla: MLA, norm: Tensor) -> AttentionWeights:
    config = mla.config
    kv_b_HXC = mla.kv_b_proj.weight.detach().unflatten(0, (config.num_attention_heads, -1))
    k_HNC, v_HVC = kv_b_HXC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    low_rank = config.q_lora_rank is not None
    q_in = mla.q_a_proj.weight if low_rank else mla.q_proj.weight * mla.scale
    return AttentionWeights(
        norm=norm,
        q_kv_a=torch.cat((q_in, mla.kv_a_proj_with_mqa.weight)),
        q_norm=mla.q_a_layernorm.weight.detach() if low_rank else None,
        q_b=mla.q_b_proj.weight * mla.scale if low_rank else None,
        kv_norm=mla.kv_a_layernorm.weight.detach(),
        w_uk_HNC=k_HNC.contiguous(),
        w_uv_HCV=v_HVC.transpose(1, 2).contiguous(),
        kv_b=mla.kv_b_proj.weight.detach(),
        o=mla.o_proj.weight.detach(),
    )
