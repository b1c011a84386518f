"""A rank's experts, cut out of a layer's."""

from __future__ import annotations

import torch

from teacher.kernels.moe.reference import ExpertWeights
from teacher.parallel.placement.placement import Placement


def own_experts(weights: ExpertWeights, placement: Placement, rank: int) -> ExpertWeights:
    """The experts in the slots of `rank`, copied out of all."""
    own = torch.tensor(placement.of_rank(rank), device=weights.gate_up_E2ID.device)
    # By bytes: torch indexes no E4M3 on every device.
    of_rank = [part.view(torch.uint8)[own].view(part.dtype) for part in weights]
    return ExpertWeights(*of_rank)
