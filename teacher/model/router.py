"""The router of DeepSeekMoE (DeepSeek-V3 s.2.1.2): sigmoid scores, bias for choice only, group-limited top-k.

FP32 throughout, autocast switched off: a rounded score changes which experts are chosen.

Shape legend: N tokens, D hidden, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.model.config import DeepseekV3Config


class Routing(NamedTuple):
    """Experts that each token goes to. `weights_NK` are the gates (normalised, scaled), FP32, differentiable."""

    indices_NK: Tensor
    weights_NK: Tensor
    scores_NE: Tensor


class Router(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
            indices_NK = self._choose(scores_NE.detach())
            weights_NK = scores_NE.gather(1, indices_NK)  # eq. 13: gates come from the scores without bias
            if self.config.norm_topk_prob:
                weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
            return Routing(indices_NK, weights_NK * self.config.routed_scaling_factor, scores_NE)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        config = self.config
        choice_NE = scores_NE + self.e_score_correction_bias
        if config.n_group > 1:
            # Node-limited routing: keep the topk_group groups whose best two experts sum highest.
            choice_NGe = choice_NE.unflatten(1, (config.n_group, -1))
            group_scores_NG = choice_NGe.topk(2, dim=-1).values.sum(dim=-1)
            kept_groups = group_scores_NG.topk(config.topk_group, dim=-1, sorted=False).indices
            dropped_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter(1, kept_groups, False)
            choice_NE = choice_NGe.masked_fill(dropped_NG.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def expert_load(indices_NK: Tensor, num_experts: int) -> Tensor:
    """Tokens sent to each expert, FP32 [E]; no synchronisation, static shape."""
    experts = torch.arange(num_experts, device=indices_NK.device)
    return (indices_NK.flatten().unsqueeze(1) == experts).sum(dim=0, dtype=torch.float32)
