"""Quantisation for FP8 training (DeepSeek-V3 s.3.3): one tensor is an operand of two products with different K.

A gradient meets the transposed weights in tiles of 1x128 along its columns, and the layer's input in tiles of 1x128
along the tokens (the paper's 128x1). Hopper's FP8 tensor cores take K-major operands alone, so the second form is
written transposed. Both come from the same BF16 numbers: nothing is quantised twice.

Weights are quantised once a step, with a transposed copy for the gradient of the input: 2 bytes a parameter.

Shape legend: N tokens, R rows with padding, T tiles of 128 rows, D columns, G = D / 128, I expert intermediate,
E routed experts, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.moe.training.grouped import gather_rows
from teacher.kernels.moe.training.reference import (
    BothWays,
    ColumnQuantised,
    QuantisedSwigluGradients,
    TrainingWeight,
    swiglu_gradients_twin,
)
from teacher.kernels.quantise.reference import Quantised, num_groups, quantise_twin
from teacher.model.fp8 import BLOCK, quantise_blocks


def gather_quantise(
    x_ND: Tensor, grouping: Grouping, top_k: int, *, rowwise: bool = True, columnwise: bool = False
) -> BothWays:
    """Quantise each row's token, zeros for padding. Raises ValueError unless 128 divides D."""
    num_groups(x_ND.shape[1])
    if x_ND.numel() and runs_kernels(x_ND):
        from teacher.kernels.moe.training.grouped_quantise_triton import gather_quantise_kernel

        return gather_quantise_kernel(x_ND.contiguous(), grouping, top_k, rowwise=rowwise, columnwise=columnwise)
    rows_RD = gather_rows(x_ND, grouping, top_k)
    return BothWays(quantise_twin(rows_RD) if rowwise else None, quantise_columns_twin(rows_RD) if columnwise else None)


def swiglu_backward_quantise(
    grad_RI: Tensor, gate_up: Quantised, gates_P: Tensor, grouping: Grouping
) -> QuantisedSwigluGradients:
    """Do as `grouped.swiglu_backward`, from a quantised gate_up [R, 2I] to quantised gradients."""
    if grad_RI.numel() and runs_kernels(grad_RI):
        from teacher.kernels.moe.training.grouped_quantise_triton import swiglu_backward_quantise_kernel

        return swiglu_backward_quantise_kernel(grad_RI, gate_up, gates_P, grouping)
    gate_up_R2I = gate_up.values_MK.float() * gate_up.scale_inv_MG.repeat_interleave(BLOCK, dim=1)
    inner, weighted, grad_gate, grad_up = swiglu_gradients_twin(grad_RI, gate_up_R2I, gates_P, grouping)
    both = torch.cat((grad_gate, grad_up), dim=1)
    gates_R = (grad_RI.float() * inner).sum(dim=1)
    return QuantisedSwigluGradients(
        quantise_twin(both), quantise_columns_twin(both), quantise_columns_twin(weighted), gates_R
    )


def quantise_columns_twin(x_RD: Tensor) -> ColumnQuantised:
    """Quantise [R, D] transposed, in tiles of 128 rows, in plain torch."""
    values, scale_inv = quantise_twin(x_RD.T.contiguous())
    return ColumnQuantised(values, scale_inv.T.contiguous())


def quantise_expert_weight(weight_ENK: Tensor) -> TrainingWeight:
    """Blocks of 128x128, as checkpoints store them, both ways round. Raises ValueError unless 128 divides N and K."""
    num_groups(weight_ENK.shape[1]), num_groups(weight_ENK.shape[2])
    return TrainingWeight(*_quantise_expert_weight(weight_ENK))


@torch.library.custom_op("potstill::quantise_expert_weight", mutates_args=())
def _quantise_expert_weight(weight_ENK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator, so that torch.compile does not look into the kernel's launch."""
    if runs_kernels(weight_ENK):
        from teacher.kernels.moe.training.grouped_quantise_triton import quantise_expert_weight_kernel

        return quantise_expert_weight_kernel(weight_ENK.contiguous())
    parts = [quantise_blocks(weight_NK) for weight_NK in weight_ENK]
    values, scales = torch.stack([v for v, _ in parts]), torch.stack([s for _, s in parts])
    # Copies even where a side of one makes the transpose contiguous: an operator's results may not share memory.
    turned = [t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in (values, scales)]
    return values, scales, *turned


@_quantise_expert_weight.register_fake
def _(weight_ENK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_experts, num_rows, num_columns = weight_ENK.shape
    p, q = num_rows // BLOCK, num_columns // BLOCK
    e4m3 = {"dtype": torch.float8_e4m3fn, "device": weight_ENK.device}
    return (
        torch.empty(num_experts, num_rows, num_columns, **e4m3),
        torch.empty(num_experts, p, q, device=weight_ENK.device),
        torch.empty(num_experts, num_columns, num_rows, **e4m3),
        torch.empty(num_experts, q, p, device=weight_ENK.device),
    )
