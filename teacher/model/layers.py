"""Decoder layers: dense MLP, DeepSeekMoE block, the layer itself, and the MTP module (DeepSeek-V3 s.2.1, 2.2).

Shape legend: B sequences, T positions, D hidden, E routed experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.model.balance import sequence_balance_loss
from teacher.model.config import DeepseekV3Config
from teacher.model.experts import Experts, ExpertsKind
from teacher.model.mla import MLA
from teacher.model.norm import RMSNorm
from teacher.model.router import Router, expert_load

Rotation = tuple[Tensor, Tensor]


class MoEStatistics(NamedTuple):
    """Statistics of one MoE layer: tokens per expert FP32 [E], and the sequence-wise balance loss (unweighted)."""

    load_E: Tensor
    balance_loss: Tensor


class DenseMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoE(nn.Module):
    """Shared experts on every token plus the routed ones (eq. 12)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = DenseMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BTD: Tensor, kind: ExpertsKind) -> tuple[Tensor, MoEStatistics]:
        routing = self.gate(x_BTD.flatten(0, 1))
        routed = self.experts(x_BTD.flatten(0, 1), routing, kind).view_as(x_BTD)
        by_sequence = x_BTD.shape[:2]
        statistics = MoEStatistics(
            expert_load(routing.indices_NK, routing.scores_NE.shape[1]),
            sequence_balance_loss(
                routing.scores_NE.unflatten(0, by_sequence), routing.indices_NK.unflatten(0, by_sequence)
            ),
        )
        return routed + self.shared_experts(x_BTD), statistics


class DecoderLayer(nn.Module):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: DeepseekMoE | DenseMLP = (
            DeepseekMoE(config) if config.is_moe(index) else DenseMLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Tensor | None, kind: ExpertsKind
    ) -> tuple[Tensor, MoEStatistics | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask)
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, DenseMLP):
            return x_BTD + self.mlp(normed), None
        out, statistics = self.mlp(normed, kind)
        return x_BTD + out, statistics


class SharedHead(nn.Module):
    """The MTP module's last norm. The head itself is the main model's; checkpoints hold a copy of it here."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """One multi-token prediction module (s.2.2, eq. 21-23), depth 1.

    At position i it joins the main model's final hidden state h_i with the embedding of token i+1 and predicts token
    i+2. Embedding and head belong to the main model. The order inside the concatenation is the checkpoint's
    (embedding first), which differs from the paper's; h_i comes after the main model's final norm, as vLLM serves it.
    """

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(
        self, hidden_BTD: Tensor, next_embedding_BTD: Tensor, rotation: Rotation, mask: Tensor | None, kind: ExpertsKind
    ) -> tuple[Tensor, MoEStatistics | None]:
        """Normalised hidden state for the shared head, [B, T, D]."""
        joined = torch.cat((self.enorm(next_embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        out, statistics = self(self.eh_proj(joined), rotation, mask, kind)
        return self.shared_head.norm(out), statistics
