"""Types of FP8 training's routed experts, and the plain-torch twin of SwiGLU's gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from teacher.kernels.exponential import sigmoid
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.quantise.reference import Quantised


class SwigluGradients(NamedTuple):
    """BF16 gradient of gate and up [R, 2I]; BF16 inner activation times its gate [R, I]; FP32 gates' gradient [R]."""

    gate_up_R2I: Tensor
    inner_RI: Tensor
    gates_R: Tensor


def swiglu_gradients_twin(
    grad_RI: Tensor, gate_up_R2I: Tensor, gates_P: Tensor, grouping: Grouping
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP32 (inner, inner times the gates, gradient of gate, gradient of up), in the kernels' order of operations."""
    gates_R1 = F.pad(gates_P.float(), (0, 1))[grouping.pairs_R.long()].unsqueeze(1)
    gate, up = gate_up_R2I.chunk(2, dim=1)
    share = sigmoid(gate)
    inner, grad = gate * share * up, grad_RI.float()
    grad_up = grad * gates_R1 * (gate * share)
    grad_gate = grad * gates_R1 * up * (share * (1.0 + gate * (1.0 - share)))
    return inner, inner * gates_R1, grad_gate, grad_up


class ColumnQuantised(NamedTuple):
    """E4M3 [D, R], transposed, and the FP32 factors of its 1x128 tiles along R, [T, D]."""

    values_DR: Tensor
    scale_inv_TD: Tensor


class BothWays(NamedTuple):
    """The same rows along their columns and, transposed, along themselves; None where not asked for."""

    rows: Quantised | None
    columns: ColumnQuantised | None


class QuantisedSwigluGradients(NamedTuple):
    """Gradients of gate and up [R, 2I], both ways; the inner activation times its gate, transposed; FP32 gates' [R]."""

    rows: Quantised
    columns: ColumnQuantised
    inner: ColumnQuantised
    gates_R: Tensor


class TrainingWeight(NamedTuple):
    """E4M3 [E, N, K] with the factors of its 128x128 blocks, and the same transposed, [E, K, N]."""

    values_ENK: Tensor
    scale_inv: Tensor
    values_EKN: Tensor
    scale_inv_transposed: Tensor
