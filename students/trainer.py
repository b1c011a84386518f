"""TRL's SFTTrainer, held to what this project promises.

The loop, the optimizer, accelerate and FSDP2 are the library's. Changed here: batches come in length buckets whose
order survives a resume, the loss on a CPU is the plain one, a loss or gradient that is not finite ends the run before
it reaches a weight, checkpoints are marked when they are whole, and nothing is sent or written elsewhere (TRL reports
usage and writes a model card).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from distill.errors import TrainingFailure
from distill.progress import Task
from students.checkpoints import mark_complete
from students.length_buckets import LengthBuckets
from students.tokens import IGNORED


class CompletionTrainer(SFTTrainer):
    """Trains on tokens and labels that are ready (`students.tokens`)."""

    def __init__(self, *args: Any, lengths: list[int], examples_a_step: int, where: str, **kwargs: Any) -> None:
        self._where = where
        self.buckets = LengthBuckets(lengths, examples_a_step, kwargs["args"].seed)
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing of a run leaves the machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written by `students.publish.card`, once, from what was measured."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self.buckets

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        chunked = self.padding_free or self.args.device.type != "cpu"
        loss = (super().compute_loss if chunked else self._dense_loss)(model, inputs, *args, **kwargs)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingFailure(
                f"loss is {value} at step {self.state.global_step + 1}; lower sft.lr", where=self._where
            )
        return loss

    def _dense_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's loss without what it measures beside it: a fifth of a step at 0.4M parameters on a CPU.

        No attention mask is passed: padding stands on the right, where causal attention never looks back from.
        """
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        num_items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        # The count is over all processes, whose gradients are averaged afterwards.
        return loss * self.accelerator.num_processes / num_items

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(value):
            raise TrainingFailure(
                f"gradient norm is {value} at step {self.state.global_step + 1}; lower sft.lr", where=self._where
            )
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class Reporter(TrainerCallback):
    """Moves the progress bar, and sets the epoch of the buckets wherever the library forgets to."""

    def __init__(self, task: Task, buckets: LengthBuckets) -> None:
        self.task = task
        self.buckets = buckets
        self.started, self.tokens_before = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.tokens_before = time.monotonic(), int(state.num_input_tokens_seen)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.buckets.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tokens = int(state.num_input_tokens_seen) - self.tokens_before
        self.task.advance(1, tokens_per_s=round(tokens / max(time.monotonic() - self.started, 1e-9), 1))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.task.advance(0, loss=round(logs["loss"], 4))
