"""The one pre-training loop: steps, the log, progress, and a place for checkpoints. What a step does is the caller's.

`update` makes one step and returns what `measure` needs, left on the device: only a step that is logged waits for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from distill.errors import TrainingFailure
from distill.progress import Progress

LOG_EVERY = 50
LogRow = dict[str, float]
Outcome = TypeVar("Outcome")


def train(
    update: Callable[[int], Outcome],
    measure: Callable[[int, Outcome], LogRow],
    *,
    title: str,
    num_steps: int,
    tokens_per_step: int,
    log: list[LogRow],
    progress: Progress,
    first_step: int = 0,
    log_every: int = LOG_EVERY,
    step_ended: Callable[[int], None] | None = None,
) -> None:
    """Run the steps from `first_step` up and append to `log` a row for the first, every `log_every`th and the last.

    A row is the step's number, what `measure` says, the seconds of all runs (an earlier run's last row counts), the
    tokens of all steps, and the tokens a second of this run. `step_ended` is called behind every step and its row.
    """
    seconds_before = log[-1]["seconds"] if log else 0.0
    with progress.task(title, num_steps, done=first_step, unit="step") as task:
        started = time.monotonic()
        for step in range(first_step, num_steps):
            outcome = update(step)
            if step % log_every == 0 or step == num_steps - 1:
                row = {"step": step, **measure(step, outcome)}
                seconds = time.monotonic() - started
                row["seconds"] = round(seconds_before + seconds, 2)
                row["tokens"] = (step + 1) * tokens_per_step
                row["tokens_per_s"] = round((step + 1 - first_step) * tokens_per_step / seconds)
                log.append(row)
                task.advance(0, **{name: row[name] for name in ("loss", "max_load") if name in row})
            task.advance(1)
            if step_ended is not None:
                step_ended(step)


def check_finite(step: int, loss: float, message: str = "") -> None:
    """Raise TrainingFailure for a loss that is not finite; `message` says more than the number, where there is more."""
    if not math.isfinite(loss):
        raise TrainingFailure(f"the loss is {message or loss} at step {step}; lower lr", field="lr")
