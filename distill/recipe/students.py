"""Students: their bases, and how they are trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill.recipe.config import Config, Distinct


class SFTConfig(Config):
    """Supervised fine-tuning on traces: loss on the completion only."""

    lr: float = Field(gt=0, lt=1)
    num_epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(64, ge=1, description="examples an optimizer step, over all devices")
    micro_batch_size: int = Field(64, ge=1, description="examples a forward pass on one device")
    max_length: int = Field(32_768, ge=16, description="tokens; a longer example is an error, never cut")
    scheduler: Literal["cosine_with_min_lr", "linear", "constant"] = "cosine_with_min_lr"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    packing: bool = False
    rope_theta: float | None = Field(None, gt=0, description="raise the base's rope theta for longer contexts")
    save_steps: int = Field(200, ge=1)


class StudentConfig(Config):
    """One student of the zoo: a base and how it learns."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    base: str = Field(description="checkpoint folder, or a repository of the Hub")
    revision: str = "main"
    architecture: Literal["qwen2", "qwen3", "llama"]
    num_parameters: int = Field(ge=1, description="of the base, embeddings counted once where tied")
    licence: str
    chat_template: str | None = Field(None, description="template file to bake in; none: the base's own")
    eos_token: str | None = Field(None, description="end of turn, where the base's own EOS is another token")
    sft: SFTConfig


class DistillConfig(Config):
    students: Distinct[str] = Field(description="names in students/zoo, or paths of student files")
    methods: Distinct[Literal["distilled", "direct"]] = ("distilled",)
    overrides: dict[str, Any] = Field(default_factory=dict, description="laid over every student's sft settings")
    num_workers: int = Field(1, ge=1, description="students trained side by side, each in a process of its own")
