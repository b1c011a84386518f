"""The routed experts of a layer in FP8 (DeepSeek-V3 eq. 12), for inference: no host synchronisation, static shapes.

    1. `align`: each (token, choice) gets a row in its expert's run of rows; runs begin at a multiple of the tile.
    2. gate and up projection of a run, SwiGLU, quantisation: one kernel, the FP32 sums never leave the registers.
    3. down projection times the gate's weight, a row for each (token, choice).
    4. the sum over a token's choices, in the order of the choice.

Every step is deterministic: rows are placed by rank, not by who comes first, and nothing is added atomically. An index
of -1 is a choice that is served elsewhere (`teacher.parallel`): it gets no row, and counts in no sum and no load.

Shape legend: N tokens, D hidden, E routed experts, K experts per token, I expert intermediate, R rows with padding,
T tiles of rows.
"""

from __future__ import annotations

from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.moe.reference import ExpertsTiling, ExpertWeights, routed_experts_twin
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.reference import Quantised, num_groups
from teacher.model.fp8 import BLOCK


def routed_experts_fp8(
    x: Quantised, choice: Choice, weights: ExpertWeights, *, tiling: ExpertsTiling | None = None
) -> Tensor:
    """Weighted sum over each token's experts, BF16 [N, D]. Raises ValueError for shapes that do not fit."""
    num_experts, double_inner, hidden = weights.gate_up_E2ID.shape
    inner = num_groups(double_inner, parts=2) * BLOCK
    num_groups(hidden)
    if weights.down_EDI.shape != (num_experts, hidden, inner) or x.values_MK.shape[1] != hidden:
        shapes = tuple(x.values_MK.shape), tuple(weights.gate_up_E2ID.shape), tuple(weights.down_EDI.shape)
        raise ValueError(f"tokens, gate_up and down do not belong together: {shapes}")
    if runs_kernels(x.values_MK):
        chosen = tiling or default_tiling(choice.indices_NK.numel(), num_experts)
        if not chosen.fused and choice.indices_NK.numel():
            from teacher.kernels.moe.experts_prefill import routed_experts_prefill

            return routed_experts_prefill(x, choice, weights)
        from teacher.kernels.moe.experts_triton import routed_experts_kernel

        return routed_experts_kernel(x, choice, weights, tiling=chosen)
    return routed_experts_twin(x, choice, weights)


def default_tiling(num_pairs: int, num_experts: int) -> ExpertsTiling:
    """A tiling for numbers that nobody has measured, by the mean load of an expert."""
    mean = num_pairs / num_experts
    if mean <= 2:  # few experts are met: many loads in flight
        return ExpertsTiling(rows=16, weights_first=True)
    if mean <= 24:
        return ExpertsTiling(rows=16 if mean <= 8 else 32, weights_first=True, num_stages=3)
    if mean <= 40:
        return ExpertsTiling(rows=64, weights_first=False, num_stages=2, down_stages=3)
    return ExpertsTiling(rows=128, weights_first=False, fused=False)
