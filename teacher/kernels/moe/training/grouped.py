"""Rows grouped by expert for the training kernels: where every (token, choice) lies, known on the device alone.

Each expert's rows are contiguous and begin at a multiple of 128: a tile of rows has one expert, and 128 rows are one
step of K for the gradient of the weights. What an expert has too few of is padding, which every kernel here writes as
zeros; rows after the last expert's are never written nor read.

Shape legend: N tokens, K experts per token, P = N * K pairs, E routed experts, R rows with padding, T = R / 128 tiles,
D columns.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.exponential import sigmoid
from teacher.kernels.moe.reference import Grouping, align_twin
from teacher.kernels.moe.training.reference import SwigluGradients, swiglu_gradients_twin
from teacher.model.fp8 import BLOCK

BF16_CAPABILITY = (8, 0)  # Ampere: the first with BF16 tensor cores


def runs_bf16_kernels(tensor: Tensor) -> bool:
    """True on a GPU with BF16 tensor cores, or for any tensor where Triton interprets; False without Triton."""
    if runs_kernels(tensor) or os.environ.get("TRITON_INTERPRET") == "1":
        return runs_kernels(tensor)
    if not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) < BF16_CAPABILITY:
        return False
    return torch.utils._triton.has_triton_package()


def group_rows(indices_NK: Tensor, num_experts: int) -> Grouping:
    """Place each (token, choice) in its expert's run of rows, in the order of the pairs. No host synchronisation."""
    if indices_NK.numel() and runs_bf16_kernels(indices_NK):
        from teacher.kernels.moe.align_triton import align_kernel

        flat = indices_NK.flatten().long()
        load_E = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
        load_E.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return align_kernel(indices_NK.to(torch.int32).contiguous(), load_E, BLOCK)
    return align_twin(indices_NK, num_experts, BLOCK)


def tokens_of_rows(grouping: Grouping, num_pairs: int, top_k: int) -> tuple[Tensor, Tensor]:
    """(rows that hold a pair, their tokens), for the twins."""
    rows = (grouping.pairs_R < num_pairs).nonzero().flatten()
    return rows, grouping.pairs_R[rows].long() // top_k


def gather_rows(x_ND: Tensor, grouping: Grouping, top_k: int) -> Tensor:
    """Each row's token, zeros for padding, [R, D] in x's dtype."""
    if x_ND.numel() and runs_bf16_kernels(x_ND):
        from teacher.kernels.moe.training.grouped_triton import gather_rows_kernel

        return gather_rows_kernel(x_ND.contiguous(), grouping, top_k)
    out_RD = x_ND.new_zeros(grouping.pairs_R.numel(), x_ND.shape[1])
    rows, tokens = tokens_of_rows(grouping, x_ND.shape[0] * top_k, top_k)
    out_RD[rows] = x_ND[tokens]
    return out_RD


def sum_choices(pairs_PD: Tensor, top_k: int) -> Tensor:
    """Sum over each token's choices in their order, in FP32, [N, D] in the dtype of the pairs."""
    if pairs_PD.numel() and runs_bf16_kernels(pairs_PD):
        from teacher.kernels.moe.grouped_triton import sum_choices_kernel

        return sum_choices_kernel(pairs_PD, top_k)
    pairs_NKD = pairs_PD.unflatten(0, (-1, top_k))
    total_ND = torch.zeros_like(pairs_NKD[:, 0], dtype=torch.float32)
    for choice in range(top_k):
        total_ND = total_ND + pairs_NKD[:, choice].float()
    return total_ND.to(pairs_PD.dtype)


def pairs_from_rows(values_R: Tensor, grouping: Grouping, num_pairs: int) -> Tensor:
    """One number for each pair out of one for each row, [P]; what padding holds falls into a slot that is cut off."""
    out = torch.zeros(num_pairs + 1, dtype=values_R.dtype, device=values_R.device)
    return out.scatter_(0, grouping.pairs_R.long(), values_R)[:num_pairs]


def swiglu(gate_up_R2I: Tensor) -> Tensor:
    """silu(gate) * up in FP32, rounded once; gate is the first half of the columns."""
    if gate_up_R2I.numel() and runs_bf16_kernels(gate_up_R2I):
        from teacher.kernels.moe.training.grouped_triton import swiglu_kernel

        return swiglu_kernel(gate_up_R2I)
    gate, up = gate_up_R2I.float().chunk(2, dim=1)
    return (gate * sigmoid(gate) * up).to(gate_up_R2I.dtype)


def swiglu_backward(grad_RI: Tensor, gate_up_R2I: Tensor, gates_P: Tensor, grouping: Grouping) -> SwigluGradients:
    """Gradients of `gate weight * swiglu(gate_up)`, from that of the unweighted down projection's input.

    The gate's own gradient is <grad, swiglu>, since (W h) . dout = h . (W^T dout): the down projection's output is not
    kept for it.
    """
    if grad_RI.numel() and runs_bf16_kernels(grad_RI):
        from teacher.kernels.moe.training.grouped_triton import swiglu_backward_kernel

        return swiglu_backward_kernel(grad_RI, gate_up_R2I, gates_P, grouping)
    inner, weighted, grad_gate, grad_up = swiglu_gradients_twin(grad_RI, gate_up_R2I.float(), gates_P, grouping)
    both = torch.cat((grad_gate, grad_up), dim=1).to(grad_RI.dtype)
    return SwigluGradients(both, weighted.to(grad_RI.dtype), (grad_RI.float() * inner).sum(dim=1))
