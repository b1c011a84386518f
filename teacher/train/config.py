"""The settings of a pre-training run, and the rates and weights that each of its steps follows from.

Everything here is a function of the settings and the step's number, so that a run that goes on from step n, on however
many ranks, does what an undisturbed one does.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill.recipe import Config
from distill.schedule import warmup_cosine
from teacher.parallel.layout import Layout


class MemoryConfig(Config):
    """Memory for arithmetic or precision, DeepSeek-V3 s.3.2.3 and 3.3.3; for training over a layout.

    `moments`: the optimizer's. `recompute`: norms and MLA up-projections again in the backward pass instead of kept.
    `activations`: in which form the inputs of linear layers wait for it.
    """

    moments: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    activations: Literal["full", "fp8"] = "full"


class CheckpointConfig(Config):
    """`every`: steps between checkpoints, 0 for none. `keep`: how many, the newest first."""

    every: int = Field(0, ge=0)
    keep: int = Field(2, ge=1)


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
    layout: Layout = Layout()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    def lr_at(self, step: int) -> float:
        return self.lr * warmup_cosine(
            step, num_steps=self.num_steps, warmup_steps=self.warmup_steps, min_ratio=self.min_lr_ratio
        )

    def mtp_weight_at(self, step: int) -> float:
        return self.mtp_weight if 3 * step < 2 * self.num_steps else self.mtp_weight_late

    def bias_speed_at(self, step: int) -> float:
        return self.bias_speed if 30 * step < 29 * self.num_steps else 0.0

    def what_is_learned(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on; how it is spread and what it saves may change."""
        return self.model_dump(mode="json", exclude={"layout", "memory", "checkpoint"})
