"""Pre-train a small base of Qwen2's or Llama's architecture with transformers' own modules.

Plain next-token training: AdamW, linear warm-up, cosine decay, gradients clipped at 1, BF16 arithmetic on a GPU.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from distill.errors import TrainingFailure
from distill.packing import Rows
from distill.progress import Progress
from distill.recipe import Config
from distill.schedule import warmup_cosine
from students.pretrain.corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, PAD, CorpusConfig

LOG_EVERY = 50
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


def pretrain(
    model: Any,
    rows: Rows,
    base: BaseConfig,
    config: BasesConfig,
    *,
    pad_id: int,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train in place, return the log. Raises TrainingFailure as soon as a logged loss is not finite."""
    model.to(device).train()
    ids_RT = torch.from_numpy(rows.ids.astype("int32")).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=base.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=device.type == "cuda"
    )

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=pad_id)

    compiled = torch.compile(loss_of) if device.type == "cuda" else loss_of
    order = torch.Generator().manual_seed(config.seed)
    queue: list[Tensor] = []
    log: list[dict[str, float]] = []
    started = time.monotonic()
    with progress.task("pre-training a base", config.num_steps, unit="step") as task:
        for step in range(config.num_steps):
            if not queue:
                queue = list(torch.randperm(len(ids_RT), generator=order).split(config.rows_per_step))
                queue = [chunk for chunk in queue if len(chunk) == config.rows_per_step] or queue
            for group in optimizer.param_groups:
                group["lr"] = base.lr * warmup_cosine(
                    step, num_steps=config.num_steps, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio
                )
            loss = compiled(ids_RT[queue.pop().to(device)].long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % LOG_EVERY == 0 or step == config.num_steps - 1:
                value, seconds = loss.item(), time.monotonic() - started
                if not math.isfinite(value):
                    raise TrainingFailure(f"the loss is {value} at step {step}; lower lr", field="lr")
                tokens = (step + 1) * config.rows_per_step * config.corpus.row_length
                log.append({"step": step, "loss": round(value, 5), "seconds": round(seconds, 2), "tokens": tokens})
                task.advance(0, loss=log[-1]["loss"])
            task.advance(1)
    return log


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
