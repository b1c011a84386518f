"""Grouped products over rows that `grouped` has arranged, FP8 and BF16; names are DeepGEMM's.

- `m_grouped_*_contiguous`: out[r] = a[r] @ b[expert of r]^T ("nt") or @ b[expert of r] ("nn"). Forward and gradient of
  the input. The result goes to the rows or, times their gates if given, to the pairs that the rows hold.
- `k_grouped_*_contiguous`: out[e] = sum over e's rows of a[r]^T b[r], FP32, for the gradient of the weights; added to a
  buffer where one is given. Experts without rows get zeros.

FP8 products are promoted to FP32 each 128 of K (DeepSeek-V3 s.3.3.2). Rows after the last expert's stay unwritten.

Shape legend: R rows with padding, T tiles of 128 rows, P (token, choice) pairs, E routed experts, K inner,
M and N columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from teacher.kernels.dense.reference import block_gemm_twin
from teacher.kernels.device import runs_kernels
from teacher.kernels.moe.reference import Grouping
from teacher.kernels.moe.training.grouped import runs_bf16_kernels
from teacher.kernels.moe.training.reference import ColumnQuantised
from teacher.kernels.quantise.reference import Quantised
from teacher.model.fp8 import BLOCK, scale_shape


def m_grouped_fp8_gemm_nt_contiguous(
    a: Quantised,
    b_ENK: Tensor,
    b_scale_inv: Tensor,
    grouping: Grouping,
    *,
    to_pairs: int | None = None,
    gates_P: Tensor | None = None,
) -> Tensor:
    """BF16 [R, N], or [P, N] for `to_pairs` = P. Raises ValueError for shapes that do not belong together."""
    num_experts, num_columns, num_inner = b_ENK.shape
    _check(a.values_MK, num_inner, num_columns, grouping)
    expected = (num_experts, *scale_shape((num_columns, num_inner)))
    if tuple(b_scale_inv.shape) != expected:
        raise ValueError(f"the weights' scales must be {expected}, got {tuple(b_scale_inv.shape)}")
    out = _empty_out(a.values_MK, num_columns, to_pairs)
    if runs_kernels(out) and out.numel():
        from teacher.kernels.moe.grouped_gemm_kernels import m_grouped_fp8_kernel

        m_grouped_fp8_kernel(a, b_ENK, b_scale_inv, grouping, out, to_pairs is not None, gates_P)
        return out
    for expert, rows in _runs(grouping):
        part = Quantised(a.values_MK[rows], a.scale_inv_MG[rows])
        product = block_gemm_twin(part, b_ENK[expert], b_scale_inv[expert], dtype=torch.float32)
        _put(out, product, rows, grouping, to_pairs, gates_P)
    return out


def m_grouped_bf16_gemm_contiguous(
    a_RK: Tensor,
    b: Tensor,
    grouping: Grouping,
    *,
    transposed: bool = True,
    to_pairs: int | None = None,
    gates_P: Tensor | None = None,
) -> Tensor:
    """Multiply as the FP8 form does; b is [E, N, K] ("nt") or, where not `transposed`, [E, K, N] ("nn")."""
    num_columns, num_inner = b.shape[1:] if transposed else b.shape[:0:-1]
    _check(a_RK, num_inner, num_columns, grouping)
    out = _empty_out(a_RK, num_columns, to_pairs)
    if runs_bf16_kernels(out) and out.numel() and a_RK.dtype == torch.bfloat16:
        from teacher.kernels.moe.training.grouped_gemm_kernels import m_grouped_bf16_kernel

        m_grouped_bf16_kernel(a_RK, b, grouping, out, transposed, to_pairs is not None, gates_P)
        return out
    for expert, rows in _runs(grouping):
        weight = b[expert].float()
        product = a_RK[rows].float() @ (weight.T if transposed else weight)
        _put(out, product, rows, grouping, to_pairs, gates_P)
    return out


def k_grouped_fp8_gemm_nt_contiguous(
    a: ColumnQuantised, b: ColumnQuantised, grouping: Grouping, *, out_EMN: Tensor | None = None
) -> Tensor:
    """FP32 [E, M, N] from a [M, R] and b [N, R]; added to `out_EMN` in place where given."""
    shape = (grouping.load_E.numel(), a.values_DR.shape[0], b.values_DR.shape[0])
    out, accumulate = _gradient(shape, out_EMN, a.values_DR.device)
    if not a.values_DR.shape[1]:
        return out if accumulate else out.zero_()
    if runs_kernels(out):
        from teacher.kernels.moe.training.grouped_gemm_kernels import k_grouped_fp8_kernel

        k_grouped_fp8_kernel(a, b, grouping, out, accumulate)
        return out
    starts = _starts(grouping)
    for expert in range(shape[0]):
        total = torch.zeros(shape[1:], device=out.device)
        for tile in range(starts[expert], starts[expert + 1]):
            rows = slice(tile * BLOCK, (tile + 1) * BLOCK)
            product = a.values_DR[:, rows].float() @ b.values_DR[:, rows].float().T
            total += product * a.scale_inv_TD[tile, :, None] * b.scale_inv_TD[tile, None, :]
        out[expert] = out[expert] + total if accumulate else total
    return out


def k_grouped_bf16_gemm_tn_contiguous(
    a_RM: Tensor, b_RN: Tensor, grouping: Grouping, *, out_EMN: Tensor | None = None
) -> Tensor:
    """FP32 [E, M, N]; added to `out_EMN` in place where given."""
    shape = (grouping.load_E.numel(), a_RM.shape[1], b_RN.shape[1])
    out, accumulate = _gradient(shape, out_EMN, a_RM.device)
    if not a_RM.shape[0]:
        return out if accumulate else out.zero_()
    if runs_bf16_kernels(out) and a_RM.dtype == torch.bfloat16:
        from teacher.kernels.moe.training.grouped_gemm_kernels import k_grouped_bf16_kernel

        k_grouped_bf16_kernel(a_RM, b_RN, grouping, out, accumulate)
        return out
    starts = _starts(grouping)
    for expert in range(shape[0]):
        rows = slice(starts[expert] * BLOCK, starts[expert + 1] * BLOCK)
        total = a_RM[rows].float().T @ b_RN[rows].float()
        out[expert] = out[expert] + total if accumulate else total
    return out


def _check(a: Tensor, num_inner: int, num_columns: int, grouping: Grouping) -> None:
    if tuple(a.shape) != (grouping.pairs_R.numel(), num_inner) or num_columns % BLOCK or num_inner % BLOCK:
        wanted = f"[{grouping.pairs_R.numel()}, {num_inner}], with columns that {BLOCK} divides"
        raise ValueError(f"the rows must be {wanted}, got {tuple(a.shape)} for {num_columns} columns")


def _empty_out(a: Tensor, num_columns: int, to_pairs: int | None) -> Tensor:
    return torch.empty(a.shape[0] if to_pairs is None else to_pairs, num_columns, dtype=torch.bfloat16, device=a.device)


def _gradient(shape: tuple[int, ...], given: Tensor | None, device: torch.device) -> tuple[Tensor, bool]:
    if given is None:
        return torch.empty(shape, dtype=torch.float32, device=device), False
    if tuple(given.shape) != shape or given.dtype != torch.float32 or not given.is_contiguous():
        got = f"{given.dtype} {tuple(given.shape)}"
        raise ValueError(f"the gradient's buffer must be contiguous FP32 {shape}, got {got}")
    return given, True


# --- twins ------------------------------------------------------------------------------------------------------------


def _starts(grouping: Grouping) -> list[int]:
    tiles_E = (grouping.load_E.long() + BLOCK - 1) // BLOCK
    return [0, *tiles_E.cumsum(0).tolist()]


def _runs(grouping: Grouping) -> Iterator[tuple[int, slice]]:
    starts = _starts(grouping)
    for expert, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin < end:
            yield expert, slice(begin * BLOCK, end * BLOCK)


def _put(
    out: Tensor, product: Tensor, rows: slice, grouping: Grouping, to_pairs: int | None, gates_P: Tensor | None
) -> None:
    if to_pairs is None:
        out[rows] = product.to(out.dtype)
        return
    pairs = grouping.pairs_R[rows].long()
    held = pairs < to_pairs
    chosen = product[held] if gates_P is None else product[held] * gates_P[pairs[held], None]
    out[pairs[held]] = chosen.to(out.dtype)
