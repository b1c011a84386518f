"""One optimizer step of a model on one device: loss, backward pass, clipped gradients, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)  # DeepSeek-V3 (arXiv 2412.19437) s.4.2


class Update:
    """Call it with the inputs of `losses` to make one step.

    `losses` returns the loss first, then what else the caller wants to see of the step, detached; on a GPU it is
    compiled as a whole. `groups` are AdamW's parameter groups with a `weight_decay` each.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[..., tuple[Tensor, ...]],
        *,
        groups: list[dict[str, Any]],
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.model, self.max_grad_norm = model, max_grad_norm
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=on_gpu)
        self._losses = torch.compile(losses) if on_gpu else losses

    def __call__(self, *inputs: Tensor, lr: float) -> tuple[Tensor, ...]:
        """(loss, the rest of what `losses` returns, the gradients' norm before clipping), without synchronisation."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, *rest = self._losses(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), *rest, norm
