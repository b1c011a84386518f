"""Pre-train a small base of Qwen2's or Llama's architecture with transformers' own modules.

Plain next-token training: AdamW, linear warm-up, cosine decay, gradients clipped at 1, BF16 arithmetic on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from distill.packing import Rows
from distill.recipe import Config
from distill.schedule import warmup_cosine
from distill.training.loop import LOG_EVERY, DeviceRun, LogRow, check_finite
from distill.training.losses import cross_entropy
from students.pretrain.corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, PAD, CorpusConfig

MAX_GRAD_NORM = 1.0
MAX_POSITIONS = 1024


class BaseConfig(Config):
    architecture: Literal["qwen2", "llama"]
    hidden_size: int = Field(ge=16)
    intermediate_size: int = Field(ge=16)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    lr: float = Field(gt=0)


class BasesConfig(Config):
    seed: int = 23
    vocab_size: int = Field(ge=300)
    corpus: CorpusConfig
    rows_per_step: int = Field(256, ge=1)
    num_steps: int = Field(ge=1)
    warmup_steps: int = Field(200, ge=1)
    min_lr_ratio: float = Field(0.02, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    bases: dict[str, BaseConfig]


def build_model(base: BaseConfig, tokenizer: Tokenizer, vocab_size: int) -> Any:
    """A transformers model with fresh weights, special token ids set."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        base.architecture
    ]
    shape = base.model_dump(exclude={"architecture", "lr"})
    config = config_class(
        **shape,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return model_class(config)


class BasePretraining(DeviceRun):
    """A run of one base. `pad_id` is the token that no loss is taken on."""

    title = "pre-training a base"

    def __init__(
        self, model: Any, rows: Rows, base: BaseConfig, config: BasesConfig, *, pad_id: int, device: torch.device
    ) -> None:
        def lr_at(step: int) -> float:
            return base.lr * warmup_cosine(
                step, num_steps=config.num_steps, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio
            )

        self.model, self.pad_id = model.to(device).train(), pad_id
        groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
        super().__init__(
            model, rows, groups, lr_at, num_steps=config.num_steps, rows_per_step=config.rows_per_step,
            seed=config.seed, max_grad_norm=MAX_GRAD_NORM, device=device, log_every=LOG_EVERY,
        )  # fmt: skip

    def losses(self, ids_RT: Tensor) -> tuple[Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_RTV = self.model(input_ids=ids_RT, use_cache=False).logits
        return (cross_entropy(logits_RTV, ids_RT, ahead=1, ignored=self.pad_id),)

    def measure(self, step: int, outcome: tuple[Tensor, ...]) -> LogRow:
        loss = outcome[0].item()
        check_finite(step, loss)
        return {"loss": round(loss, 5)}


def save_base(model: Any, tokenizer: Tokenizer, out_dir: Path) -> None:
    """A Hugging Face checkpoint folder: FP32 weights, tokenizer, plain chat template, generation defaults."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, "<|im_start|>"],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    model.float().save_pretrained(out_dir)
    fast.save_pretrained(out_dir)
    GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    ).save_pretrained(out_dir)
