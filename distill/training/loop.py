"""The one pre-training loop: steps, the log, progress, and places for what a run does besides.

A step returns what measuring it needs and leaves that on the device: only a step that is logged waits for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from distill.errors import TrainingFailure
from distill.packing import Rows
from distill.progress import Progress
from distill.training.row_order import RowOrder

LOG_EVERY = 50
BETAS = (0.9, 0.95)  # of AdamW, DeepSeek-V3 (arXiv 2412.19437) s.4.2
LogRow = dict[str, float]
Outcome = TypeVar("Outcome")


class TrainingRun(Generic[Outcome]):
    """One run: a subclass says what a step is, and how it is measured.

    `log` has a row for the first, every `log_every`th and the last step: its number, what `measure` says, the seconds
    (those of an earlier run that is resumed counted), the tokens of all steps, and the tokens a second since the start.
    """

    title: str

    def __init__(self, *, num_steps: int, tokens_per_step: int, log_every: int = LOG_EVERY) -> None:
        self.num_steps, self.tokens_per_step, self.log_every = num_steps, tokens_per_step, log_every
        self.log: list[LogRow] = []

    def run(self, progress: Progress) -> None:
        """Train to the end. Raises TrainingFailure as soon as a measured loss is not finite."""
        first_step = self.resume()
        seconds_before = self.log[-1]["seconds"] if self.log else 0.0
        with progress.task(self.title, self.num_steps, done=first_step, unit="step") as task:
            started = time.monotonic()
            for step in range(first_step, self.num_steps):
                outcome = self.make_step(step)
                if step % self.log_every == 0 or step == self.num_steps - 1:
                    row = {"step": step, **self.measure(step, outcome)}
                    seconds = time.monotonic() - started
                    row["seconds"] = round(seconds_before + seconds, 2)
                    row["tokens"] = (step + 1) * self.tokens_per_step
                    row["tokens_per_s"] = round((step + 1 - first_step) * self.tokens_per_step / seconds)
                    self.log.append(row)
                    shown = ("loss", "tokens_per_s", "max_load")
                    task.advance(0, **{name: row[name] for name in shown if name in row})
                task.advance(1)
                self.step_ended(step)

    def make_step(self, step: int) -> Outcome:
        raise NotImplementedError

    def measure(self, step: int, outcome: Outcome) -> LogRow:
        raise NotImplementedError

    def resume(self) -> int:
        """Take up an earlier run, its log too; returns the number of steps that are done."""
        return 0

    def step_ended(self, step: int) -> None:
        """Do what comes behind a step and its row, such as a checkpoint."""


class DeviceRun(TrainingRun[tuple[Tensor, ...]]):
    """A run of one model on one device: loss, backward pass, clipped gradients, AdamW.

    `groups` are AdamW's parameter groups with a `weight_decay` each. `losses` is compiled as a whole on a GPU.
    """

    def __init__(
        self, model: nn.Module, rows: Rows, groups: list[dict[str, object]], lr_at: Callable[[int], float], *,
        num_steps: int, rows_per_step: int, seed: int, max_grad_norm: float, device: torch.device, log_every: int,
    ) -> None:  # fmt: skip
        super().__init__(num_steps=num_steps, tokens_per_step=rows_per_step * rows.ids.shape[1], log_every=log_every)
        on_gpu = device.type == "cuda"
        self.device, self.lr_at, self.max_grad_norm = device, lr_at, max_grad_norm
        self.parameters = list(model.parameters())
        self.ids_RT = torch.from_numpy(rows.ids.astype("int32")).to(device)
        self.order = RowOrder(len(self.ids_RT), rows_per_step, seed=seed)
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=on_gpu)
        self._compiled = torch.compile(self.losses) if on_gpu else self.losses

    def make_step(self, step: int) -> tuple[Tensor, ...]:
        """(loss, what else `losses` returns, the gradients' norm before clipping), without synchronisation."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        loss, *rest = self._compiled(*self.inputs(step, self.order.rows(step).to(self.device)))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), *rest, norm

    def inputs(self, step: int, rows: Tensor) -> tuple[Tensor, ...]:
        """The tensors that `losses` takes, of these rows."""
        return (self.ids_RT[rows].long(),)

    def losses(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The loss first, then what else is to be seen of a step, detached."""
        raise NotImplementedError


def check_finite(step: int, loss: float, message: str = "") -> None:
    """Raise TrainingFailure for a loss that is not finite; `message` says more than the number, where there is more."""
    if not math.isfinite(loss):
        raise TrainingFailure(f"the loss is {message or loss} at step {step}; lower lr", field="lr")
