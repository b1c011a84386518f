"""Train a small teacher of V3's architecture from scratch on one GPU (or, for tests, on a CPU).

V3's recipe at a small scale: next-token loss and MTP loss (s.2.2), auxiliary-loss-free balancing by biases with a very
small sequence-wise loss (s.2.1.2), AdamW with beta 0.9 / 0.95 and weight decay 0.1, gradients clipped at 1 (s.4.2).
BF16 arithmetic, FP32 weights and optimizer. Documents are packed into rows without masking one from another (s.4.1).

Shape legend: R rows, T positions, L MoE layers, E routed experts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.packing import Rows
from distill.training.loop import LOG_EVERY, DeviceRun, LogRow, check_finite
from distill.training.losses import cross_entropy, labels
from teacher.model.balance import update_bias
from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3
from teacher.train.config import PretrainConfig

TITLE = "pre-training the teacher"


class Pretraining(DeviceRun):
    """A run in one process. A row of its log has losses, rate, maximal expert load and speed."""

    title = TITLE

    def __init__(
        self, model: DeepseekV3, rows: Rows, config: PretrainConfig, *, device: torch.device, log_every: int = LOG_EVERY
    ) -> None:
        self.model, self.config = model.to(device), config
        self.experts: ExpertsKind = "dense"
        self.is_target_RT = torch.from_numpy(rows.is_target).to(device)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        super().__init__(
            model, rows, groups, config.lr_at, num_steps=config.num_steps, rows_per_step=config.rows_per_step,
            seed=config.seed, max_grad_norm=config.max_grad_norm, device=device, log_every=log_every,
        )  # fmt: skip

    def make_step(self, step: int) -> tuple[Tensor, ...]:
        """(loss, main, MTP and balance loss apart, loads [L, E], norm of the gradients)."""
        loss, parts, load_LE, norm = super().make_step(step)
        if speed := self.config.bias_speed_at(step):
            update_bias(self.model.routers(), load_LE, speed)
        return loss, parts, load_LE, norm

    def inputs(self, step: int, rows: Tensor) -> tuple[Tensor, ...]:
        weights = torch.tensor([self.config.mtp_weight_at(step), self.config.balance_alpha], device=self.device)
        return self.ids_RT[rows].long(), self.is_target_RT[rows], weights

    def losses(self, ids_RT: Tensor, is_target_RT: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.model(ids_RT, experts=self.experts)
        labels_RT = labels(ids_RT, is_target_RT)
        main = cross_entropy(out.logits_BTV, labels_RT, ahead=1)
        mtp = main.new_zeros(())
        if out.mtp_logits_BTV is not None:
            mtp = cross_entropy(out.mtp_logits_BTV, labels_RT, ahead=2)
        loss = main + weights[0] * mtp + weights[1] * out.balance_loss
        return loss, torch.stack((main, mtp, out.balance_loss)).detach(), out.load_LE

    def measure(self, step: int, outcome: tuple[Tensor, ...]) -> LogRow:
        _, parts, load_LE, norm = outcome
        check_losses(step, parts)
        return log_entries(self.config, step, parts, max_load(load_LE), norm)


def check_losses(step: int, parts: Tensor) -> None:
    """Raise TrainingFailure for a main or MTP loss that is not finite."""
    main, mtp, _ = parts.tolist()
    check_finite(step, main + mtp, f"{main} (MTP {mtp})")


def max_load(load_LE: Tensor) -> Tensor:
    """The most loaded expert of all layers over its layer's mean; 1 without MoE layers."""
    return (load_LE.amax(1) / load_LE.mean(1)).max() if len(load_LE) else torch.ones(())


def log_entries(config: PretrainConfig, step: int, parts: Tensor, largest_load: Tensor, norm: Tensor | float) -> LogRow:
    """A step's part of a log row; `parts` are its main, MTP and balance loss."""
    main, mtp, balance = parts.tolist()
    return {
        "loss": round(main, 5),
        "mtp_loss": round(mtp, 5),
        "balance_loss": round(balance, 4),
        "max_load": round(float(largest_load), 3),
        "grad_norm": round(float(norm), 4),
        "lr": config.lr_at(step),
    }
