"""Rows gathered by expert, SwiGLU and its gradients, in Triton, for training in FP8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arithmetic_triton import sigmoid, to_dtype
from teacher.kernels.moe.grouped_triton import B
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.moe.training.reference import SwigluGradients
from teacher.model.fp8 import BLOCK

EXACT = {"enable_fp_fusion": False}
ROWS_A_PROGRAM = 32


@triton.jit
def _gather_rows(
    x_ptr, pairs_ptr, experts_ptr, out_ptr, num_pairs, top_k, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(1) * ROWS
    if tl.load(experts_ptr + row // B) >= 0:
        rows = row + tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        pairs = tl.load(pairs_ptr + rows)
        inside = columns[None, :] < width
        tokens = (pairs // top_k).to(tl.int64)
        x = tl.load(
            x_ptr + tokens[:, None] * width + columns[None, :], mask=inside & (pairs < num_pairs)[:, None], other=0.0
        )
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], x, mask=inside)


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, inner, ROWS: tl.constexpr):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * B + tl.arange(0, B)
    gate_ptrs = gate_up_ptr + rows.to(tl.int64)[:, None] * (2 * inner) + columns[None, :]
    gate, up = tl.load(gate_ptrs).to(tl.float32), tl.load(gate_ptrs + inner).to(tl.float32)
    out = to_dtype(gate * sigmoid(gate) * up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * inner + columns[None, :], out)


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, pairs_ptr, experts_ptr, gates_ptr, grad_gate_up_ptr, inner_ptr, partial_ptr,
    num_pairs, num_rows, inner, ROWS: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1) * ROWS
    if tl.load(experts_ptr + row // B) >= 0:
        rows = row + tl.arange(0, ROWS)
        columns = group * B + tl.arange(0, B)
        pairs = tl.load(pairs_ptr + rows)
        gates = tl.load(gates_ptr + pairs, mask=pairs < num_pairs, other=0.0)[:, None]
        narrow = rows.to(tl.int64)[:, None] * inner + columns[None, :]
        wide = rows.to(tl.int64)[:, None] * (2 * inner) + columns[None, :]
        grad = tl.load(grad_ptr + narrow).to(tl.float32)
        gate = tl.load(gate_up_ptr + wide).to(tl.float32)
        up = tl.load(gate_up_ptr + wide + inner).to(tl.float32)
        share = sigmoid(gate)
        activated = gate * share * up
        dtype: tl.constexpr = inner_ptr.dtype.element_ty
        tl.store(partial_ptr + group * num_rows + rows, tl.sum(grad * activated, axis=1))
        tl.store(inner_ptr + narrow, to_dtype(activated * gates, dtype))
        tl.store(grad_gate_up_ptr + wide + inner, to_dtype(grad * gates * (gate * share), dtype))
        grad_gate = grad * gates * up * (share * (1.0 + gate * (1.0 - share)))
        tl.store(grad_gate_up_ptr + wide, to_dtype(grad_gate, dtype))


def gather_rows_kernel(x_ND: Tensor, grouping: Grouping, top_k: int) -> Tensor:
    """Launch `gather_rows`: [R, D] from [N, D]."""
    num_rows, width = grouping.pairs_R.numel(), x_ND.shape[1]
    out = torch.empty(num_rows, width, dtype=x_ND.dtype, device=x_ND.device)
    _gather_rows[(triton.cdiv(width, 256), num_rows // ROWS_A_PROGRAM)](
        x_ND, grouping.pairs_R, grouping.experts_T, out, x_ND.shape[0] * top_k, top_k, width,
        ROWS=ROWS_A_PROGRAM, COLUMNS=256,
    )  # fmt: skip
    return out


def swiglu_kernel(gate_up_R2I: Tensor) -> Tensor:
    """Launch `swiglu`: [R, I] from [R, 2I]."""
    num_rows, inner = gate_up_R2I.shape[0], gate_up_R2I.shape[1] // 2
    out = torch.empty(num_rows, inner, dtype=gate_up_R2I.dtype, device=gate_up_R2I.device)
    _swiglu[(inner // BLOCK, num_rows // ROWS_A_PROGRAM)](gate_up_R2I, out, inner, ROWS=ROWS_A_PROGRAM, **EXACT)
    return out


def swiglu_backward_kernel(
    grad_RI: Tensor, gate_up_R2I: Tensor, gates_P: Tensor, grouping: Grouping
) -> SwigluGradients:
    """Launch `swiglu_backward` for BF16 [R, I] and [R, 2I]."""
    num_rows, inner = grad_RI.shape
    both, weighted = torch.empty_like(gate_up_R2I), torch.empty_like(grad_RI)
    # Zeros, since the rows after the last expert's are summed with the others.
    partial = torch.zeros(inner // BLOCK, num_rows, device=grad_RI.device)
    _swiglu_backward[(inner // BLOCK, num_rows // ROWS_A_PROGRAM)](
        grad_RI, gate_up_R2I, grouping.pairs_R, grouping.experts_T, gates_P, both, weighted, partial,
        gates_P.numel(), num_rows, inner, ROWS=ROWS_A_PROGRAM, **EXACT,
    )  # fmt: skip
    return SwigluGradients(both, weighted, partial.sum(dim=0))
