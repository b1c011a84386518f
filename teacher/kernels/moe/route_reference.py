"""Types of the router's choices, and its plain-torch twin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.exponential import sigmoid
from teacher.model.config import DeepseekV3Config

LEAST_SUM = 1e-20


class Choice(NamedTuple):
    """int32 [N, K] best first, FP32 [N, K], int32 [E]."""

    indices_NK: Tensor
    weights_NK: Tensor
    load_E: Tensor


class Routes(NamedTuple):
    """Rules by which tokens choose; names as in the model's config."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @classmethod
    def of(cls, config: DeepseekV3Config) -> Routes:
        """Take the rules out of a model's config."""
        return cls(*(getattr(config, name) for name in cls._fields))


def route_twin(logits_NE: Tensor, bias_E: Tensor, routes: Routes) -> Choice:
    """`route` in plain torch, from [N, E]; any numbers of experts and groups."""
    num_tokens, num_experts = logits_NE.shape
    scores_NE = sigmoid(logits_NE.float())
    choice_NE = scores_NE + bias_E
    if routes.n_group > 1:
        choice_NGe = choice_NE.unflatten(1, (routes.n_group, -1))
        best_NG2 = choice_NGe.topk(2, dim=-1).values
        kept_NT = _best(best_NG2[..., 0] + best_NG2[..., 1], routes.topk_group)
        dropped_NG = torch.ones(num_tokens, routes.n_group, dtype=torch.bool, device=logits_NE.device)
        dropped_NG = dropped_NG.scatter(1, kept_NT, False)
        choice_NE = choice_NGe.masked_fill(dropped_NG.unsqueeze(-1), float("-inf")).flatten(1)
    indices_NK = _best(choice_NE, routes.num_experts_per_tok)
    weights_NK = scores_NE.gather(1, indices_NK)
    if routes.norm_topk_prob:
        total_N = torch.zeros(num_tokens, device=logits_NE.device)
        for gate_N in weights_NK.unbind(1):  # in the order of the choice: a sum of FP32 numbers depends on it
            total_N = total_N + gate_N
        weights_NK = weights_NK / (total_N + LEAST_SUM).unsqueeze(1)
    load_E = torch.bincount(indices_NK.flatten(), minlength=num_experts).to(torch.int32)
    return Choice(indices_NK.to(torch.int32), weights_NK * routes.routed_scaling_factor, load_E)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, best first, the lower index first among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
