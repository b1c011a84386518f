"""The stages of a V3 model, run by `torch.distributed.pipelining`'s schedules.

`1f1b` holds one stage a rank; `zbv` (zero-bubble, arXiv 2401.10241 s.4) and `dualpipev` hold two, the r-th and the r-th
from the end, so that the first and the last stage, with embedding and head, share rank 0. The order in which ranks work
is torch's own; `benchmarks.schedules.schedules.dual_pipe_v` is the same order, for reckoning before a run.

The sequence-wise balance loss (DeepSeek-V3 eq. 17-20) arises in every MoE layer, but the loss only at the end: each
stage adds its layers' share to the gradients on the way back, so that what is optimised is the sum of the
micro-batches' losses plus `balance_weight` times that of the balance losses. A forward and a backward that `dualpipev`
pairs are overlapped where experts are spread (`teacher.parallel.pipeline.overlapped`), else one runs behind the other.

Shape legend: B sequences of a micro-batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble

from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3
from teacher.parallel.layout import STAGES_PER_RANK, ScheduleName
from teacher.parallel.meshes import Meshes
from teacher.parallel.pipeline.overlapped import overlap_pairs
from teacher.parallel.pipeline.stage import pipeline_blocks

Loss = Callable[[Any, Tensor], Tensor]
_SCHEDULES: dict[ScheduleName, Callable[..., Any]] = {
    "1f1b": Schedule1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline:
    """This rank's stages of a model and the schedule that runs them.

    `loss(output, labels)` gives a micro-batch's loss from what the last block gives. `shape` is that of a
    micro-batch's ids, (B, T). Raises ValueError for more stages than layers, and torch's own for fewer micro-batches
    than a schedule takes (`dualpipev`: one a stage).
    """

    def __init__(
        self,
        model: DeepseekV3,
        meshes: Meshes,
        *,
        loss: Loss,
        shape: tuple[int, int],
        balance_weight: float = 0.0,
        experts: ExpertsKind = "sorted",
    ) -> None:
        layout, config = meshes.layout, model.config
        own = layout.stages_of(meshes.at.pp)
        blocks = pipeline_blocks(model, layout, own, balance_weight=balance_weight, experts=experts)
        self.blocks = nn.ModuleList(block.to(meshes.device) for block in blocks)
        self.is_first, self.is_last = 0 in own, layout.num_stages - 1 in own
        self._with_ids = bool(config.num_nextn_predict_layers)
        # Given shapes, torch need not run every stage once to learn them.
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        sizes = config.hidden_size, config.vocab_size
        hidden, logits = (torch.empty(*shape, size, device="meta", requires_grad=True) for size in sizes)
        at_end = (logits, logits) if self._with_ids else (logits,)
        stages = [
            PipelineStage(
                block,
                stage,
                layout.num_stages,
                meshes.device,
                input_args=(ids if stage == 0 else hidden,),
                output_args=at_end if stage == layout.num_stages - 1 else (hidden,),
                group=meshes.pipeline,
            )
            for stage, block in zip(own, self.blocks, strict=True)
        ]
        one_stage = STAGES_PER_RANK[layout.schedule] == 1
        make = _SCHEDULES[layout.schedule]
        # Losses say themselves what share of the batch they are.
        self.schedule = make(stages[0] if one_stage else stages, layout.microbatches, loss_fn=loss, scale_grads=False)
        if layout.schedule == "dualpipev" and layout.overlapped and layout.ep > 1:
            overlap_pairs(self.schedule)

    def step(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Tensor | None:
        """Gradients of the micro-batches' losses, summed and added to the blocks' parameters.

        The batch [micro-batches * B, T] is cut evenly; every rank gives its replica's, and uses what its stages need.
        Returns the sum of the losses (without the balance loss) on the rank of the last stage. A lost rank is torch's
        RuntimeError.
        """
        losses: list[Tensor] = []
        # The schedule's phases, on each rank: warm-up (forwards, until the pipe is full), steady state (a forward and a
        # backward in turn; a pair of `dualpipev` is one action), cool-down (backwards; zero-bubble schedules put the
        # gradients of weights where a rank would wait). A stage waits for its neighbours' sends alone, never for all.
        self.schedule.step(
            *([input_ids_BT] if self.is_first else []),
            **({"input_ids_BT": input_ids_BT} if self._with_ids else {}),
            **({"target": labels_BT, "losses": losses} if self.is_last else {}),
        )
        return torch.stack(losses).sum().detach() if self.is_last else None
