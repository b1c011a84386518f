"""Train a small teacher of V3's architecture from scratch on one GPU (or, for tests, on a CPU).

V3's recipe at a small scale: next-token loss and MTP loss (s.2.2), auxiliary-loss-free balancing by biases with a very
small sequence-wise loss (s.2.1.2), AdamW with beta 0.9 / 0.95 and weight decay 0.1, gradients clipped at 1 (s.4.2).
BF16 arithmetic, FP32 weights and optimizer. Documents are packed into rows without masking one from another (s.4.1).

Shape legend: R rows, T positions, L MoE layers, E routed experts, V vocabulary.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill.errors import TrainingFailure
from distill.packing import Rows
from distill.progress import Progress
from distill.recipe import Config
from distill.schedule import warmup_cosine
from teacher.model.balance import update_bias
from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3

LOG_EVERY = 50


class PretrainConfig(Config):
    """`architecture` are fields of DeepseekV3Config; the vocabulary and the special tokens are filled in."""

    seed: int = 17
    architecture: dict[str, Any]
    vocab_size: int = Field(ge=300)
    num_problems: int = Field(ge=1)
    facts_share: float = Field(0.1, ge=0, lt=1)
    row_length: int = Field(256, ge=16)
    rows_per_step: int = Field(256, ge=1)
    num_steps: int = Field(ge=1)
    lr: float = Field(2e-3, gt=0)
    min_lr_ratio: float = Field(0.02, ge=0, le=1)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mtp_weight: float = Field(0.3, ge=0, description="V3: 0.3 for the first two thirds, then mtp_weight_late")
    mtp_weight_late: float = Field(0.1, ge=0)
    bias_speed: float = Field(1e-3, ge=0, description="V3: 0.001, and 0 for the last thirtieth of training")
    balance_alpha: float = Field(1e-4, ge=0)


class Pretraining:
    """One run. `log` holds a row every LOG_EVERY steps: losses, learning rate, maximal expert load, tokens a second."""

    def __init__(self, model: DeepseekV3, rows: Rows, config: PretrainConfig, *, device: torch.device) -> None:
        self.model, self.config, self.device = model.to(device), config, device
        self.experts: ExpertsKind = "dense"
        self.ids_RT = torch.from_numpy(rows.ids.astype("int32")).to(device)
        self.is_target_RT = torch.from_numpy(rows.is_target).to(device)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.forward = torch.compile(self._losses) if device.type == "cuda" else self._losses
        self.log: list[dict[str, float]] = []

    def run(self, progress: Progress) -> None:
        """Raises TrainingFailure as soon as a logged loss is not finite."""
        config = self.config
        order = torch.Generator().manual_seed(config.seed)
        queue: list[Tensor] = []
        with progress.task("pre-training the teacher", config.num_steps, unit="step") as task:
            started = time.monotonic()
            for step in range(config.num_steps):
                if not queue:
                    queue = list(torch.randperm(len(self.ids_RT), generator=order).split(config.rows_per_step))
                    queue = [rows for rows in queue if len(rows) == config.rows_per_step] or queue
                seen = self._step(step, queue.pop().to(self.device))
                if step % LOG_EVERY == 0 or step == config.num_steps - 1:
                    row = self._log_row(step, seen, time.monotonic() - started)
                    task.advance(0, loss=row["loss"], max_load=row["max_load"])
                task.advance(1)

    def _step(self, step: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        mtp_weight = config.mtp_weight if 3 * step < 2 * config.num_steps else config.mtp_weight_late
        weights = torch.tensor([mtp_weight, config.balance_alpha], device=self.device)
        loss, parts, load_LE = self.forward(self.ids_RT[rows].long(), self.is_target_RT[rows], weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if 30 * step < 29 * config.num_steps:
            update_bias(self.model.routers(), load_LE, config.bias_speed)
        return parts, load_LE, norm

    def _losses(self, ids_RT: Tensor, is_target_RT: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.model(ids_RT, experts=self.experts)
        main = _cross_entropy(out.logits_BTV, ids_RT, is_target_RT, ahead=1)
        mtp = main.new_zeros(())
        if out.mtp_logits_BTV is not None:
            mtp = _cross_entropy(out.mtp_logits_BTV, ids_RT, is_target_RT, ahead=2)
        loss = main + weights[0] * mtp + weights[1] * out.balance_loss
        return loss, torch.stack((main, mtp, out.balance_loss)).detach(), out.load_LE

    def _lr(self, step: int) -> float:
        config = self.config
        return config.lr * warmup_cosine(
            step, num_steps=config.num_steps, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio
        )

    def _log_row(self, step: int, seen: tuple[Tensor, Tensor, Tensor], seconds: float) -> dict[str, float]:
        parts, load_LE, norm = seen
        main, mtp, balance = parts.tolist()
        if not math.isfinite(main + mtp):
            raise TrainingFailure(f"the loss is {main} (MTP {mtp}) at step {step}; lower lr", field="lr")
        tokens = (step + 1) * self.config.rows_per_step * self.config.row_length
        row = {
            "step": step,
            "loss": round(main, 5),
            "mtp_loss": round(mtp, 5),
            "balance_loss": round(balance, 4),
            "max_load": round(float((load_LE.amax(1) / load_LE.mean(1)).max()), 3) if len(load_LE) else 1.0,
            "grad_norm": round(float(norm), 4),
            "lr": self._lr(step),
            "seconds": round(seconds, 2),
            "tokens_per_s": round(tokens / seconds),
        }
        self.log.append(row)
        return row


def _cross_entropy(logits_BTV: Tensor, ids_BT: Tensor, is_target_BT: Tensor, *, ahead: int) -> Tensor:
    """Mean loss of predicting token i + `ahead` at position i, over positions whose token is a target."""
    labels = ids_BT[:, ahead:].masked_fill(~is_target_BT[:, ahead:], -100)
    return F.cross_entropy(logits_BTV[:, :-ahead].flatten(0, 1).float(), labels.flatten())
