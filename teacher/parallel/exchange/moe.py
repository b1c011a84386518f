"""A layer's routed experts spread over ranks: each holds only the experts of its own slots.

`shard_experts` puts `ExpertParallelExperts` in the place of every `Experts` of a model; router, shared experts and all
else stay as they are, on every rank. What a layer computes is what it computed on one rank, forward and backward, but
for the order of its sums and what `Wire` rounds.

Gradients of experts are sums over the tokens of all ranks; those of everything else are each rank's own and are for
data parallelism to add up. Experts with replicas are for inference: their copies would drift apart.

Shape legend: N tokens here, D hidden, K experts per token, M rows received, P (row, choice) pairs of this rank,
E own slots, I expert intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teacher.model.experts import Experts, ExpertsKind, routed_experts
from teacher.model.router import Routing
from teacher.model.transformer import DeepseekV3
from teacher.parallel.exchange.copies import NOWHERE, sum_copies
from teacher.parallel.exchange.dispatch import Exchange


class ExpertParallelExperts(nn.Module):
    """Takes the place of `teacher.model.experts.Experts`; a call is collective.

    Raises ValueError for weights of another number of experts than the placement's, and for gradients of replicated
    experts.
    """

    def __init__(self, experts: Experts, exchange: Exchange) -> None:
        super().__init__()
        placement, rank = exchange.placement, exchange.ranks.rank
        if experts.gate_up_proj.shape[0] != placement.num_experts:
            raise ValueError(f"{experts.gate_up_proj.shape[0]} experts, but a placement of {placement.num_experts}")
        own = torch.tensor(placement.of_rank(rank), device=experts.gate_up_proj.device)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[own].clone())
        self.down_proj = nn.Parameter(experts.down_proj.detach()[own].clone())
        self.exchange = exchange

    def forward(self, x_ND: Tensor, routing: Routing, kind: ExpertsKind) -> Tensor:
        with_gradients = torch.is_grad_enabled() and self.gate_up_proj.requires_grad
        if with_gradients and self.exchange.placement.has_replicas:
            raise ValueError("experts with replicas have no gradients: their copies would drift apart")
        arrived = self.exchange.dispatch(x_ND, routing.indices_NK, routing.weights_NK)
        out_MD = local_experts(
            arrived.x_MD, arrived.slots_MK, arrived.weights_MK, self.gate_up_proj, self.down_proj, kind=kind
        )
        return self.exchange.combine(out_MD, arrived)


def local_experts(
    x_MD: Tensor,
    slots_MK: Tensor,
    weights_MK: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    *,
    kind: ExpertsKind,
) -> Tensor:
    """This rank's share of each row's weighted sum, [M, D] in x's dtype; a slot of -1 is another rank's.

    Only pairs of this rank are computed, and the host waits for their number.
    """
    present_MK = slots_MK != NOWHERE
    per_token = slots_MK.shape[1]
    pairs = present_MK.flatten().nonzero().flatten()
    slots_P1 = slots_MK.flatten()[pairs].unsqueeze(1)
    weights_P1 = weights_MK.flatten()[pairs].unsqueeze(1)
    # No pair at all: `dense` takes empty products, so that gradients are zeros and every rank goes on in step.
    chosen: ExpertsKind = kind if pairs.numel() else "dense"
    out_PD = routed_experts(x_MD[pairs // per_token], gate_up_E2ID, down_EDI, slots_P1, weights_P1, kind=chosen)
    places_MK = torch.where(present_MK, present_MK.flatten().cumsum(0).view_as(slots_MK) - 1, NOWHERE)
    return sum_copies(out_PD, places_MK).to(x_MD.dtype)


def shard_experts(model: DeepseekV3, exchange: Exchange) -> DeepseekV3:
    """Keep only this rank's experts in every MoE layer, in place."""
    holders = [module for module in model.modules() if isinstance(getattr(module, "experts", None), Experts)]
    for holder in holders:
        holder.experts = ExpertParallelExperts(holder.experts, exchange)
    return model
