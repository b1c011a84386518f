"""The routed experts: one function, several ways to compute the same sum. No token is ever dropped.

    out[n] = sum_k weights[n, k] * down[e] (silu(gate[e] x[n]) * up[e] x[n]),  e = indices[n, k]   (DeepSeek-V3 eq. 12)

- `grouped`: tokens sorted by expert, one `torch._grouped_mm` per projection with offsets on the device. Static shapes,
  no host synchronisation, no atomics. BF16 on CUDA. For training and large batches.
- `dense`: every expert on every token as two plain matrix products, gates of zero where not selected. E/K times the
  arithmetic, perfect GEMM shapes: for tiny experts.
- `sorted`: rows gathered expert by expert, for inference on a CPU (data-dependent shapes).

Shape legend: N tokens, D hidden, E routed experts, K experts per token, I expert intermediate, S padded rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.model.config import DeepseekV3Config
from teacher.model.router import Routing

ExpertsKind = Literal["grouped", "dense", "sorted"]

# Each expert's rows start at a multiple of this: the grouped GEMM's weight gradient contracts over them and wants
# 16-byte aligned runs.
ROW_ALIGNMENT = 16


class Experts(nn.Module):
    """Weights of all routed experts of a layer, stacked: gate over up [E, 2I, D], down [E, D, I]."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        num, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, inner))

    def forward(self, x_ND: Tensor, routing: Routing, kind: ExpertsKind) -> Tensor:
        return routed_experts(
            x_ND, self.gate_up_proj, self.down_proj, routing.indices_NK, routing.weights_NK, kind=kind
        )


def routed_experts(
    x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, indices_NK: Tensor, weights_NK: Tensor, *, kind: ExpertsKind
) -> Tensor:
    """Gated sum over each token's experts, [N, D] in x's dtype."""
    if kind == "grouped":
        return _grouped(x_ND, gate_up_E2ID, down_EDI, indices_NK, weights_NK)
    if kind == "dense":
        return _dense(x_ND, gate_up_E2ID, down_EDI, indices_NK, weights_NK)
    return _sorted(x_ND, gate_up_E2ID, down_EDI, indices_NK, weights_NK)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _grouped(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
    dtype = torch.bfloat16 if x_ND.is_cuda else x_ND.dtype  # the CUDA kernel takes BF16 alone
    slots_NK, offsets_E, num_slots = _slots(indices_NK, gate_up_E2ID.shape[0])
    rows_SD = _Scatter.apply(x_ND.to(dtype), slots_NK, num_slots)
    gate_up_S2I = torch._grouped_mm(rows_SD, gate_up_E2ID.to(dtype).transpose(1, 2), offs=offsets_E)
    out_SD = torch._grouped_mm(_swiglu(gate_up_S2I), down_EDI.to(dtype).transpose(1, 2), offs=offsets_E)
    out_NKD = _Gather.apply(out_SD, slots_NK)
    return (out_NKD * weights_NK.unsqueeze(-1)).sum(dim=1).to(x_ND.dtype)


def _slots(indices_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """Place each (token, choice) in a buffer where every expert's rows begin aligned.

    Returns slots [N, K], the end of every expert's run (int32 [E]; the last run takes the whole tail, so that no row
    stays uncomputed) and the buffer's length, which depends on shapes alone.
    """
    flat = indices_NK.flatten()
    by_expert, order = flat.sort(stable=True)
    experts = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    start_E = torch.searchsorted(by_expert, experts)
    end_E = torch.searchsorted(by_expert, experts, right=True)
    padded_E = (end_E - start_E + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    padded_end_E = padded_E.cumsum(0)
    shift_E = padded_end_E - padded_E - start_E
    ranks = torch.arange(flat.numel(), device=flat.device)
    slots = torch.empty_like(flat).scatter(0, order, ranks + shift_E[by_expert])
    rows = -(-flat.numel() // ROW_ALIGNMENT) * ROW_ALIGNMENT
    num_slots = rows + num_experts * ROW_ALIGNMENT
    last = torch.full_like(padded_end_E[:1], num_slots)
    return slots.view_as(indices_NK), torch.cat((padded_end_E[:-1], last)).to(torch.int32), num_slots


class _Scatter(torch.autograd.Function):
    """Rows of tokens into their slots, zero elsewhere. The backward is a gather; autograd's own would be atomic."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, slots_NK: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots_NK)
        num_tokens, per_token = slots_NK.shape
        copies = x_ND.unsqueeze(1).expand(num_tokens, per_token, -1).reshape(num_tokens * per_token, -1)
        return x_ND.new_zeros(num_slots, x_ND.shape[1]).index_copy(0, slots_NK.flatten(), copies)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (slots_NK,) = ctx.saved_tensors
        return grad_SD[slots_NK].float().sum(dim=1).to(grad_SD.dtype), None, None


class _Gather(torch.autograd.Function):
    """Rows of slots back to their tokens, [N, K, D]. Slots are distinct, so the backward copies instead of adding."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, slots_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slots_NK)
        ctx.num_slots = rows_SD.shape[0]
        return rows_SD[slots_NK]

    @staticmethod
    def backward(ctx: Any, grad_NKD: Tensor) -> tuple[Tensor, None]:
        (slots_NK,) = ctx.saved_tensors
        grad_SD = grad_NKD.new_zeros(ctx.num_slots, grad_NKD.shape[-1])
        return grad_SD.index_copy(0, slots_NK.flatten(), grad_NKD.flatten(0, 1)), None


def _dense(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
    num_experts = gate_up_E2ID.shape[0]
    gates_NE = weights_NK.new_zeros(x_ND.shape[0], num_experts).scatter(1, indices_NK, weights_NK)
    inner_NEI = _swiglu(F.linear(x_ND, gate_up_E2ID.flatten(0, 1)).unflatten(1, (num_experts, -1)))
    # The gate commutes with the linear down projection, so the sum over experts is the second product itself.
    inner_NEI = inner_NEI * gates_NE.unsqueeze(-1).to(inner_NEI.dtype)
    return F.linear(inner_NEI.flatten(1), down_EDI.transpose(0, 1).flatten(1)).to(x_ND.dtype)


def _sorted(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
    per_token = indices_NK.shape[1]
    order = indices_NK.flatten().argsort(stable=True)
    counts = torch.bincount(indices_NK.flatten(), minlength=gate_up_E2ID.shape[0]).tolist()
    rows = x_ND[order // per_token]
    parts = [
        F.linear(_swiglu(F.linear(part, gate_up_E2ID[expert])), down_EDI[expert])
        for expert, part in enumerate(rows.split(counts))
        if len(part)
    ]
    out_NKD = torch.empty_like(rows).index_copy(0, order, torch.cat(parts)).unflatten(0, (-1, per_token))
    return (out_NKD * weights_NK.unsqueeze(-1)).sum(dim=1).to(x_ND.dtype)
