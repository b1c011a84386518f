"""The router after its matrix product, in one kernel (DeepSeek-V3 s.2.1.2; the model's form is `teacher.model.router`).

Sigmoid, bias for the choice alone, groups ranked by the sum of their best two, top-k within the kept groups, gates
normalised and scaled, and the load of every expert. Equal choices go to the lower index, as torch's top-k on a GPU
takes them.

Shape legend: N tokens, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from teacher.kernels.device import runs_kernels
from teacher.kernels.moe.route_reference import Choice, Routes, route_twin


def route(logits_NE: Tensor, bias_E: Tensor, routes: Routes) -> Choice:
    """Choose experts from FP32 logits. Raises ValueError for groups that do not divide the experts."""
    num_experts = logits_NE.shape[1]
    if num_experts % routes.n_group or num_experts // routes.n_group < 2:
        raise ValueError(f"{num_experts} experts do not fall into {routes.n_group} groups of two or more")
    if runs_kernels(logits_NE):
        from teacher.kernels.moe.route_triton import route_kernel

        return route_kernel(logits_NE, bias_E, routes)
    return route_twin(logits_NE, bias_E, routes)
