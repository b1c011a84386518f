"""How the students learned: loss and learning rate by step, from the logs that training left beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.errors import DataError

LOG = "train_log.json"
MAX_POINTS = 160  # of a curve that is drawn; each is the mean of the steps that it stands for


@dataclass(frozen=True)
class Curve:
    """One student's training, `steps` thinned to at most MAX_POINTS: (step, loss, learning rate)."""

    name: str
    method: str
    steps: Sequence[tuple[float, float, float]]
    num_steps: int
    num_tokens: int

    @property
    def student(self) -> str:
        return self.name.removesuffix(f"-{self.method}")


def read_curves(run_dir: Path) -> list[Curve]:
    """The curves of a run's students. Raises DataError for a log that is none."""
    return [_curve(path) for path in sorted((run_dir / "distill").glob(f"*/{LOG}"))]


def _curve(path: Path) -> Curve:
    try:
        log = json.loads(path.read_text("utf-8"))
        steps = [(float(one["step"]), float(one["loss"]), float(one["lr"])) for one in log["steps"]]
        return Curve(path.parent.name, str(log["method"]), _thin(steps), int(log["num_steps"]), int(log["num_tokens"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(f"not a training log ({exc!r})", where=path) from exc


def _thin(steps: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    size = -(-len(steps) // MAX_POINTS) or 1
    parts = [steps[first : first + size] for first in range(0, len(steps), size)]
    return [
        (fmean(step for step, _, _ in part), fmean(loss for _, loss, _ in part), fmean(lr for _, _, lr in part))
        for part in parts
    ]


def curve_rows(curves: Sequence[Curve]) -> list[Mapping[str, Any]]:
    return [{"name": one.name, "step": step, "loss": loss, "lr": lr} for one in curves for step, loss, lr in one.steps]
