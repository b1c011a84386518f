"""Balancing the experts' load (DeepSeek-V3 s.2.1.2): the bias update, and the small sequence-wise loss.

Shape legend: B sequences, T positions, E routed experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from teacher.model.router import Router


@torch.no_grad()
def update_bias(routers: Iterable[Router], load_LE: Tensor, speed: float) -> None:
    """After a step: raise the bias of underloaded experts by `speed`, lower that of overloaded ones.

    `load_LE` counts the tokens each expert got in the step (summed over micro-batches and data-parallel ranks), in the
    order of `routers`. V3 uses speed 0.001. Works in place and without host synchronisation.
    """
    step_LE = speed * torch.sign(load_LE.mean(dim=-1, keepdim=True) - load_LE)
    for router, step_E in zip(routers, step_LE, strict=True):
        router.e_score_correction_bias.add_(step_E.to(router.e_score_correction_bias))


def sequence_balance_loss(scores_BTE: Tensor, indices_BTK: Tensor) -> Tensor:
    """Eq. 17-20 without the factor alpha (V3: 1e-4), averaged over sequences; 1 where the load is even.

    f_i = E / (K T) * #{t : expert i chosen},  P_i = mean_t s_it / sum_j s_jt,  L = sum_i f_i P_i.
    """
    num_experts, per_token = scores_BTE.shape[-1], indices_BTK.shape[-1]
    experts = torch.arange(num_experts, device=indices_BTK.device)
    chosen_BE = (indices_BTK.flatten(1).unsqueeze(-1) == experts).sum(dim=1, dtype=torch.float32)
    f_BE = chosen_BE * (num_experts / (per_token * scores_BTE.shape[1]))
    p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()
