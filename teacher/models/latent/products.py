"""The seam between the teacher's forward pass and its matrix products: in the weights' own type, or in FP8.

What goes into a product is prepared once for all that read it: a norm's result, quantised where the products are FP8.
The residual stream is added up on the way, by the norm that follows: so that one kernel can do all three.

Shape legend: M rows, D hidden, K columns in, N columns out, E routed experts, I expert intermediate.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.model.block_checkpoint import Entry
from teacher.models.latent.operations import Operations
from teacher.models.latent.weights import MLPWeights, MoEWeights


class Products(Protocol):
    """`Any` is what this kind of product reads."""

    def norm(
        self,
        x_MD: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        add_MD: Tensor | None = None,
        for_experts: bool = False,
    ) -> tuple[Tensor, Any]:
        """x + add, and its RMSNorm, ready for products; for those of `experts` too, if asked for."""
        ...

    def enter(self, x_MK: Tensor) -> Any:
        """Ready for products, as it is."""
        ...

    def linear(self, x: Any, weight: Entry) -> Tensor:
        """[M, N]."""
        ...

    def mlp(self, x: Any, weights: MLPWeights) -> Tensor:
        """SwiGLU, [M, D]."""
        ...

    def experts(self, x: Any, weights: MoEWeights) -> Tensor:
        """Routed and shared experts (DeepSeek-V3 eq. 12), [M, D]."""
        ...


class PlainProducts:
    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def norm(
        self,
        x_MD: Tensor,
        weight: Tensor | None,
        eps: float,
        *,
        add_MD: Tensor | None = None,
        for_experts: bool = False,
    ) -> tuple[Tensor, Tensor]:
        x_MD = x_MD if add_MD is None else x_MD + add_MD
        return x_MD, F.rms_norm(x_MD, (x_MD.shape[-1],), weight, eps)

    def enter(self, x_MK: Tensor) -> Tensor:
        return x_MK

    def linear(self, x: Tensor, weight: Entry) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.linear(x, weight)

    def mlp(self, x: Tensor, weights: MLPWeights) -> Tensor:
        gate, up = self.linear(x, weights.gate_up).chunk(2, dim=-1)
        return self.linear(F.silu(gate) * up, weights.down)

    def experts(self, x: Tensor, weights: MoEWeights) -> Tensor:
        """Tokens sorted by expert, one grouped product per projection; no padding, no drop."""
        indices_MK, gates_MK, ends_E = self._operations.route(x, weights)
        order = indices_MK.flatten().argsort(stable=True)
        rows = x[order // indices_MK.shape[1]]
        gate, up = torch._grouped_mm(rows, weights.gate_up_ED2I, offs=ends_E).chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(gate) * up, weights.down_EID, offs=ends_E)
        # Back into the order of the pairs, in which a token's choices lie side by side for their weighted sum.
        out_MKD = torch.empty_like(out).index_copy_(0, order, out).view(*indices_MK.shape, -1)
        return torch.bmm(gates_MK.to(out.dtype)[:, None], out_MKD).squeeze(1) + self.mlp(x, weights.shared)
