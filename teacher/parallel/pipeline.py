"""A V3 model cut into pipeline stages, run by `torch.distributed.pipelining`'s schedules.

`1f1b` holds one stage a rank; `zbv` (zero-bubble, arXiv 2401.10241 s.4) and `dualpipev` hold two, the r-th and the r-th
from the end, so that the first and the last stage, with embedding and head, share rank 0. The order in which ranks work
is torch's own; `teacher.parallel.schedules.dual_pipe_v` is the same order, for reckoning before a run.

The sequence-wise balance loss (DeepSeek-V3 eq. 17-20) arises in every MoE layer, but the loss only at the end: each
stage adds its layers' share to the gradients on the way back, so that what is optimised is the cross-entropy plus
`balance_weight` times their sum. The MTP module is not cut: it shares embedding and head with both ends (ValueError).
Without functions for overlapped steps torch runs a forward and a backward that `dualpipev` pairs one after the other.

Shape legend: B sequences of a micro-batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble

from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks

ScheduleName = Literal["1f1b", "zbv", "dualpipev"]
_SCHEDULES: dict[str, tuple[Callable[..., Any], int]] = {  # and stages a rank
    "1f1b": (Schedule1F1B, 1),
    "zbv": (ScheduleZBVZeroBubble, 2),
    "dualpipev": (ScheduleDualPipeV, 2),
}


class PipelineBlock(nn.Module):
    """A run of a model's layers; the first also embeds, the last also norms and predicts. Parameters are the model's.

    Takes token ids [B, T] or hidden states [B, T, D]; gives hidden states or logits [B, T, V].
    """

    def __init__(self, model: DeepseekV3, layers: range, *, balance_weight: float, experts: ExpertsKind) -> None:
        super().__init__()
        trunk = model.model
        self.embed_tokens = trunk.embed_tokens if layers.start == 0 else None
        self.layers = nn.ModuleDict({str(index): trunk.layers[index] for index in layers})
        is_last = layers.stop == model.config.num_hidden_layers
        self.norm, self.lm_head = (trunk.norm, model.lm_head) if is_last else (None, None)
        self.rotary = model.rotary
        self.balance_weight, self.experts = balance_weight, experts

    def forward(self, given: Tensor) -> Tensor:
        hidden_BTD = given if self.embed_tokens is None else self.embed_tokens(given)
        rotation = self.rotary(hidden_BTD.shape[1], None)
        balance = []
        for layer in self.layers.values():
            hidden_BTD, seen = layer(hidden_BTD, rotation, None, self.experts)
            balance += [] if seen is None else [seen.balance_loss]
        if balance and self.balance_weight:
            hidden_BTD = _WithLoss.apply(hidden_BTD, self.balance_weight * torch.stack(balance).sum())
        return hidden_BTD if self.lm_head is None else self.lm_head(self.norm(hidden_BTD))


class _WithLoss(torch.autograd.Function):
    """The hidden states as they are; on the way back `loss` gets the gradient that it would have in the sum."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden_BTD.clone()  # a view could not be a stage's output: torch detaches that in place

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_BTD, torch.ones_like(ctx.like)


def pipeline_blocks(
    model: DeepseekV3, num_stages: int, *, balance_weight: float = 0.0, experts: ExpertsKind = "sorted"
) -> list[PipelineBlock]:
    """The stages in order, layers shared out as evenly as they go. Raises ValueError for fewer layers, and for MTP."""
    num_layers = model.config.num_hidden_layers
    if model.config.num_nextn_predict_layers:
        raise ValueError("a model with an MTP module cannot be cut: it needs the embedding and the head at both ends")
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers make 1 to {num_layers} stages, got {num_stages}")
    bounds = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return [
        PipelineBlock(model, range(*ends), balance_weight=balance_weight, experts=experts)
        for ends in itertools.pairwise(bounds)
    ]


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a micro-batch; targets are the tokens that follow each position."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


class Pipeline:
    """This rank's stages of a model and the schedule that runs them. All ranks build it from the same weights.

    Raises ValueError for an unknown schedule, and torch's own for fewer micro-batches than a schedule takes
    (`dualpipev`: one a stage).
    """

    def __init__(
        self,
        model: DeepseekV3,
        ranks: Ranks,
        *,
        schedule: ScheduleName,
        microbatches: int,
        balance_weight: float = 0.0,
        experts: ExpertsKind = "sorted",
    ) -> None:
        if schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
        make, per_rank = _SCHEDULES[schedule]
        num_stages = per_rank * ranks.num_ranks
        blocks = pipeline_blocks(model, num_stages, balance_weight=balance_weight, experts=experts)
        own = [ranks.rank] if per_rank == 1 else [ranks.rank, num_stages - 1 - ranks.rank]
        stages = [
            PipelineStage(blocks[n].to(ranks.device), n, num_stages, ranks.device, group=ranks.world) for n in own
        ]
        self.blocks = nn.ModuleList(blocks[n] for n in own)
        self.is_first, self.is_last = 0 in own, num_stages - 1 in own
        self._schedule = make(stages[0] if per_rank == 1 else stages, microbatches, loss_fn=next_token_loss)

    def step(self, input_ids_BT: Tensor, targets_BT: Tensor) -> Tensor | None:
        """Gradients of the mean loss over the micro-batches, added to the blocks' parameters.

        The batch [micro-batches * B, T] is cut evenly; every rank gives it, and uses what its stages need. Returns the
        cross-entropy (without the balance loss) on the rank of the last stage. A lost rank is torch's RuntimeError.
        """
        losses: list[Tensor] = []
        self._schedule.step(
            *([input_ids_BT] if self.is_first else []),
            **({"target": targets_BT, "losses": losses} if self.is_last else {}),
        )
        return torch.stack(losses).mean().detach() if self.is_last else None
