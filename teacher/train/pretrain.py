"""Train a small teacher of V3's architecture from scratch on one GPU (or, for tests, on a CPU).

V3's recipe at a small scale: next-token loss and MTP loss (s.2.2), auxiliary-loss-free balancing by biases with a very
small sequence-wise loss (s.2.1.2), AdamW with beta 0.9 / 0.95 and weight decay 0.1, gradients clipped at 1 (s.4.2).
BF16 arithmetic, FP32 weights and optimizer. Documents are packed into rows without masking one from another (s.4.1).

Shape legend: R rows, T positions, L MoE layers, E routed experts, V vocabulary.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from distill.errors import TrainingFailure
from distill.packing import Rows
from distill.progress import Progress
from teacher.model.balance import update_bias
from teacher.model.experts import ExpertsKind
from teacher.model.transformer import DeepseekV3
from teacher.train.config import BETAS, PretrainConfig, RowOrder, cross_entropy, labels

LOG_EVERY = 50


class Pretraining:
    """One run. `log` holds a row every `log_every` steps: losses, rate, maximal expert load, tokens a second."""

    def __init__(
        self, model: DeepseekV3, rows: Rows, config: PretrainConfig, *, device: torch.device, log_every: int = LOG_EVERY
    ) -> None:
        self.model, self.config, self.device = model.to(device), config, device
        self.experts: ExpertsKind = "dense"
        self.ids_RT = torch.from_numpy(rows.ids.astype("int32")).to(device)
        self.is_target_RT = torch.from_numpy(rows.is_target).to(device)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=BETAS,
            fused=device.type == "cuda",
        )
        self.forward = torch.compile(self._losses) if device.type == "cuda" else self._losses
        self.log_every = log_every
        self.log: list[dict[str, float]] = []

    def run(self, progress: Progress) -> None:
        """Raises TrainingFailure as soon as a logged loss is not finite."""
        config = self.config
        order = RowOrder(len(self.ids_RT), config.rows_per_step, seed=config.seed)
        with progress.task("pre-training the teacher", config.num_steps, unit="step") as task:
            started = time.monotonic()
            for step in range(config.num_steps):
                seen = self._step(step, order.rows(step).to(self.device))
                if step % self.log_every == 0 or step == config.num_steps - 1:
                    row = self._log_row(step, seen, time.monotonic() - started)
                    task.advance(0, loss=row["loss"], max_load=row["max_load"])
                task.advance(1)

    def _step(self, step: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        weights = torch.tensor([config.mtp_weight_at(step), config.balance_alpha], device=self.device)
        loss, parts, load_LE = self.forward(self.ids_RT[rows].long(), self.is_target_RT[rows], weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if speed := config.bias_speed_at(step):
            update_bias(self.model.routers(), load_LE, speed)
        return parts, load_LE, norm

    def _losses(self, ids_RT: Tensor, is_target_RT: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.model(ids_RT, experts=self.experts)
        labels_RT = labels(ids_RT, is_target_RT)
        main = cross_entropy(out.logits_BTV, labels_RT, ahead=1)
        mtp = main.new_zeros(())
        if out.mtp_logits_BTV is not None:
            mtp = cross_entropy(out.mtp_logits_BTV, labels_RT, ahead=2)
        loss = main + weights[0] * mtp + weights[1] * out.balance_loss
        return loss, torch.stack((main, mtp, out.balance_loss)).detach(), out.load_LE

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
            "lr": self.config.lr_at(step),
            "seconds": round(seconds, 2),
            "tokens_per_s": round(tokens / seconds),
        }
        self.log.append(row)
        return row
