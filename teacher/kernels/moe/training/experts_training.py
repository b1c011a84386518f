"""The routed experts of a layer with gradients (DeepSeek-V3 eq. 12), in FP8 (s.3.3) or BF16; no host synchronisation.

    out[n] = sum_k gates[n, k] * down[e] h,   h = silu(gate[e] x[n]) * up[e] x[n],   e = indices[n, k]

All six products of FP8 training are FP8: each projection's forward, gradient of its input and gradient of its weights.
Kept for the backward are x as it came and the input of the SwiGLU (FP8 for FP8, s.3.3.3); h is computed again.

- The gates enter after the down projection. So the backward quantises each token's gradient as it is, and
  d gates = h . (down^T dout), which needs no output of the down projection; its weights take h times the gate.
- Weights' gradients are FP32. They go to `main_grads` (added, the weights get no `.grad`) or to autograd.

Two operators that torch.compile does not look into do the work; an autograd function joins them. Every step is
deterministic.

Shape legend: N tokens, D hidden, E routed experts, K experts per token, I expert intermediate, R rows with padding,
T tiles of 128 rows, P = N * K pairs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from teacher.kernels.moe.reference import Grouping, num_rows
from teacher.kernels.moe.training.grouped import (
    gather_rows,
    group_rows,
    pairs_from_rows,
    sum_choices,
    swiglu,
    swiglu_backward,
)
from teacher.kernels.moe.training.grouped_gemm import (
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_bf16_gemm_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
)
from teacher.kernels.moe.training.grouped_quantise import (
    gather_quantise,
    quantise_expert_weight,
    swiglu_backward_quantise,
)
from teacher.kernels.moe.training.reference import TrainingWeight
from teacher.kernels.quantise.quantise import quantise, swiglu_quantise
from teacher.kernels.quantise.reference import Quantised, empty_scales, num_groups
from teacher.model.fp8 import BLOCK

Precision = Literal["fp8", "bf16"]


class QuantisedExperts(NamedTuple):
    """Both weights in FP8, as `quantise_experts` makes them once a step: four bytes a parameter pair, two each way."""

    gate_up: TrainingWeight
    down: TrainingWeight


class MainGrads(NamedTuple):
    """FP32 buffers that the weights' gradients are added to."""

    gate_up_E2ID: Tensor
    down_EDI: Tensor


def quantise_experts(gate_up_E2ID: Tensor, down_EDI: Tensor) -> QuantisedExperts:
    """The FP8 operands of a step, from weights of any floating type; they hold no gradient."""
    return QuantisedExperts(quantise_expert_weight(gate_up_E2ID.detach()), quantise_expert_weight(down_EDI.detach()))


def routed_experts_training(
    x_ND: Tensor,
    indices_NK: Tensor,
    gates_NK: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    *,
    precision: Precision = "fp8",
    quantised: QuantisedExperts | None = None,
    main_grads: MainGrads | None = None,
) -> Tensor:
    """Weighted sum over each token's experts, [N, D] in x's dtype; differentiable in x, gates and both weights.

    x is computed with in BF16, the gates (any floating type) in FP32. `quantised` holds the weights' FP8 forms and
    saves making them for every call of a step. Raises ValueError for shapes that do not fit or an unknown precision.
    """
    _check(x_ND, indices_NK, gates_NK, gate_up_E2ID, down_EDI)
    if precision not in ("fp8", "bf16"):
        raise ValueError(f"precision must be 'fp8' or 'bf16', got {precision!r}")
    operands: list[Tensor] = []
    if precision == "fp8":
        gate_up, down = quantised or quantise_experts(gate_up_E2ID, down_EDI)
        operands = [*gate_up, *down]
    else:
        operands = [gate_up_E2ID.detach().to(torch.bfloat16), down_EDI.detach().to(torch.bfloat16)]
    out_ND = _RoutedExperts.apply(
        x_ND.to(torch.bfloat16), indices_NK, gates_NK.float(), gate_up_E2ID, down_EDI, main_grads, *operands
    )
    return out_ND.to(x_ND.dtype)


def routed_experts_bf16(
    x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """The same sum in BF16 without gradients, [N, D] in x's dtype: for GPUs without FP8."""
    with torch.no_grad():
        return routed_experts_training(x_ND, indices_NK, gates_NK, gate_up_E2ID, down_EDI, precision="bf16")


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        indices_NK: Tensor,
        gates_NK: Tensor,
        gate_up_E2ID: Tensor,
        down_EDI: Tensor,
        main_grads: MainGrads | None,
        *operands: Tensor,
    ) -> Tensor:
        out_ND, *kept = _forward(x_ND, indices_NK, gates_NK, list(operands))
        mains = [] if main_grads is None else list(main_grads)
        ctx.save_for_backward(x_ND, gates_NK, *kept, *operands, *mains)
        ctx.num_operands, ctx.dtype = len(operands), gate_up_E2ID.dtype
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, *rest = ctx.saved_tensors
        kept, operands, mains = rest[:5], rest[5 : 5 + ctx.num_operands], rest[5 + ctx.num_operands :]
        grad_ND = grad_ND.contiguous()
        if mains:
            grad_x, grad_gates = _backward_into(grad_ND, x_ND, gates_NK, *kept, operands, *mains)
            weights: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            grad_x, grad_gates, gate_up, down = _backward(grad_ND, x_ND, gates_NK, *kept, operands)
            weights = gate_up.to(ctx.dtype), down.to(ctx.dtype)
        return grad_x, None, grad_gates, *weights, None, *(None for _ in operands)


def _check(x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> None:
    num_experts, double_inner, hidden = gate_up_E2ID.shape
    inner = num_groups(double_inner, parts=2) * BLOCK
    num_groups(hidden)
    fits = x_ND.ndim == 2 and x_ND.shape[1] == hidden and tuple(down_EDI.shape) == (num_experts, hidden, inner)
    if not fits or indices_NK.shape != gates_NK.shape or indices_NK.shape[0] != x_ND.shape[0]:
        names = ("x", "indices", "gates", "gate_up", "down")
        given = (x_ND, indices_NK, gates_NK, gate_up_E2ID, down_EDI)
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(names, given, strict=True))
        raise ValueError(f"shapes do not belong together: {shapes}")


# --- forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("potstill::routed_experts_forward", mutates_args=())
def _forward(
    x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor, operands: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, the grouping's three, the SwiGLU's input and its scales: empty for BF16)."""
    num_pairs, top_k = indices_NK.numel(), indices_NK.shape[1]
    grouping = group_rows(indices_NK, operands[0].shape[0])
    last = {"to_pairs": num_pairs, "gates_P": gates_NK.flatten()}
    if len(operands) == 2:
        gate_up, down = operands
        rows_RD = gather_rows(x_ND, grouping, top_k)
        kept = m_grouped_bf16_gemm_contiguous(rows_RD, gate_up, grouping)
        scales = torch.empty(0, device=x_ND.device)
        pairs_PD = m_grouped_bf16_gemm_contiguous(swiglu(kept), down, grouping, **last)
    else:
        gate_up_fp8, down_fp8 = TrainingWeight(*operands[:4]), TrainingWeight(*operands[4:])
        rows = gather_quantise(x_ND, grouping, top_k).rows
        assert rows is not None
        gate_up_R2I = m_grouped_fp8_gemm_nt_contiguous(rows, *gate_up_fp8[:2], grouping)
        # FP8 is for the backward alone (s.3.3.3): SwiGLU takes the BF16 numbers here.
        kept, scales = quantise(gate_up_R2I)
        pairs_PD = m_grouped_fp8_gemm_nt_contiguous(swiglu_quantise(gate_up_R2I), *down_fp8[:2], grouping, **last)
    return sum_choices(pairs_PD, top_k), *grouping, kept, scales


@_forward.register_fake
def _(
    x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor, operands: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, double_inner = operands[0].shape[:2]
    length = num_rows(indices_NK.numel(), num_experts, BLOCK)
    fp8 = len(operands) > 2
    integers = {"dtype": torch.int32, "device": x_ND.device}
    kept = x_ND.new_empty(length, double_inner, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    scales = empty_scales(length, double_inner // BLOCK, x_ND.device) if fp8 else torch.empty(0, device=x_ND.device)
    return (
        torch.empty_like(x_ND),
        torch.empty(length, **integers),
        torch.empty(length // BLOCK, **integers),
        torch.empty(num_experts, **integers),
        kept,
        scales,
    )


# --- backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("potstill::routed_experts_backward", mutates_args=())
def _backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor,
    pairs_R: Tensor,
    experts_T: Tensor,
    load_E: Tensor,
    kept: Tensor,
    scales: Tensor,
    operands: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the gates, gate_up and down."""
    grouping = Grouping(pairs_R, experts_T, load_E)
    return _gradients(grad_ND, x_ND, gates_NK, grouping, kept, scales, operands, None)


@_backward.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor,
    pairs_R: Tensor,
    experts_T: Tensor,
    load_E: Tensor,
    kept: Tensor,
    scales: Tensor,
    operands: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_experts, double_inner, hidden = operands[0].shape
    gate_up = torch.empty(num_experts, double_inner, hidden, device=x_ND.device)
    down = torch.empty(num_experts, hidden, double_inner // 2, device=x_ND.device)
    return torch.empty_like(x_ND), torch.empty_like(gates_NK), gate_up, down


@torch.library.custom_op("potstill::routed_experts_backward_into", mutates_args=("main_gate_up", "main_down"))
def _backward_into(
    grad_ND: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor,
    pairs_R: Tensor,
    experts_T: Tensor,
    load_E: Tensor,
    kept: Tensor,
    scales: Tensor,
    operands: list[Tensor],
    main_gate_up: Tensor,
    main_down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the gates; those of the weights are added to the buffers."""
    grouping, mains = Grouping(pairs_R, experts_T, load_E), MainGrads(main_gate_up, main_down)
    return _gradients(grad_ND, x_ND, gates_NK, grouping, kept, scales, operands, mains)[:2]


@_backward_into.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor,
    pairs_R: Tensor,
    experts_T: Tensor,
    load_E: Tensor,
    kept: Tensor,
    scales: Tensor,
    operands: list[Tensor],
    main_gate_up: Tensor,
    main_down: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), torch.empty_like(gates_NK)


def _gradients(
    grad_ND: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor,
    grouping: Grouping,
    kept: Tensor,
    scales: Tensor,
    operands: list[Tensor],
    mains: MainGrads | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top_k, gates_P = gates_NK.shape[1], gates_NK.flatten()
    num_pairs = gates_P.numel()
    main_gate_up, main_down = mains or (None, None)
    if len(operands) == 2:
        gate_up, down = operands
        # Down's input gradient; through SwiGLU and gates; gate and up's input gradient; both weights' gradients.
        grad_RD, rows_RD = gather_rows(grad_ND, grouping, top_k), gather_rows(x_ND, grouping, top_k)
        grad_RI = m_grouped_bf16_gemm_contiguous(grad_RD, down, grouping, transposed=False)
        both, inner_RI, gates_R = swiglu_backward(grad_RI, kept, gates_P, grouping)
        grad_PD = m_grouped_bf16_gemm_contiguous(both, gate_up, grouping, transposed=False, to_pairs=num_pairs)
        grad_gate_up = k_grouped_bf16_gemm_tn_contiguous(both, rows_RD, grouping, out_EMN=main_gate_up)
        grad_down = k_grouped_bf16_gemm_tn_contiguous(grad_RD, inner_RI, grouping, out_EMN=main_down)
    else:
        gate_up_fp8, down_fp8 = TrainingWeight(*operands[:4]), TrainingWeight(*operands[4:])
        # The same in FP8. What two products read along different sides is quantised both ways, from the same numbers.
        grad = gather_quantise(grad_ND, grouping, top_k, columnwise=True)
        x_columns = gather_quantise(x_ND, grouping, top_k, rowwise=False, columnwise=True).columns
        assert grad.rows is not None
        assert grad.columns is not None
        assert x_columns is not None
        grad_RI = m_grouped_fp8_gemm_nt_contiguous(grad.rows, *down_fp8[2:], grouping)
        rows, columns, inner, gates_R = swiglu_backward_quantise(grad_RI, Quantised(kept, scales), gates_P, grouping)
        grad_PD = m_grouped_fp8_gemm_nt_contiguous(rows, *gate_up_fp8[2:], grouping, to_pairs=num_pairs)
        grad_gate_up = k_grouped_fp8_gemm_nt_contiguous(columns, x_columns, grouping, out_EMN=main_gate_up)
        grad_down = k_grouped_fp8_gemm_nt_contiguous(grad.columns, inner, grouping, out_EMN=main_down)
    grad_gates = pairs_from_rows(gates_R, grouping, num_pairs).view_as(gates_NK)
    return sum_choices(grad_PD, top_k), grad_gates, grad_gate_up, grad_down
