"""Random-weight bases of two layers with a character tokenizer: what the students' tests train."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from distill.recipe import SFTConfig, StudentConfig
from distill.records import Example
from distill.tables import write_records

TEMPLATES = Path("students/templates")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)


def make_tokenizer(style: str) -> PreTrainedTokenizerBase:
    """ASCII characters as tokens, split as Qwen's tokenizer does (AutoTokenizer makes one of any `qwen2` folder)."""
    specials = CHATML if style == "chatml" else LLAMA3
    bytes_ = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # a space and a newline, as byte-level tokenizers write them
    vocabulary = {token: i for i, token in enumerate([*specials, *bytes_])}
    special = {
        "eos_token": "<|im_end|>" if style == "chatml" else "<|eot_id|>",
        "pad_token": "<|endoftext|>" if style == "chatml" else None,
        "bos_token": None if style == "chatml" else "<|begin_of_text|>",
        "unk_token": None,
        "extra_special_tokens": list(specials),
    }
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **special)
    if style != "chatml":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    tokenizer.chat_template = (TEMPLATES / "chatml_plain.jinja").read_text().removesuffix("\n")
    return tokenizer


def make_base(folder: Path, *, architecture: str = "qwen2", style: str = "chatml", hidden: int = 32, **config) -> Path:
    """A checkpoint folder: two layers of Qwen2.5, Qwen3 or Llama 3, random weights."""
    tokenizer = make_tokenizer(style)
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[architecture]
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": architecture != "llama",
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(**{**settings, **config}), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_student(base: Path, *, style: str = "chatml", architecture: str = "qwen2", **sft) -> StudentConfig:
    settings = {
        "lr": 3e-3,
        "num_epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_length": 128,
        "dtype": "float32",
    }
    return StudentConfig(
        name="tiny",
        base=str(base),
        architecture=architecture,
        num_parameters=20_000,
        licence="apache-2.0",
        chat_template=str(TEMPLATES / f"{style}_think.jinja"),
        eos_token="<|im_end|>" if style == "chatml" else "<|eot_id|>",
        sft=SFTConfig(**{**settings, **sft}),
    )


def make_examples(path: Path, count: int = 64, *, direct: bool = False, seed: int = 0) -> Path:
    """Sums of one digit each, worked or bare."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        numbers = torch.randint(0, 5, (2 + i % 3,), generator=generator).tolist()
        steps, total = [], numbers[0]
        for number in numbers[1:]:
            steps.append(f"{total} + {number} = {total + number}")
            total += number
        worked = "<think>\n" + "\n".join(steps) + f"\n</think>\n\n\\boxed{{{total}}}"
        completion = f"\\boxed{{{total}}}" if direct else worked
        question = " + ".join(map(str, numbers)) + "?"
        examples.append(
            Example(question=question, completion=completion, problem_id=f"p{i}", trace_key=None, source="sums")
        )
    return write_examples(path, examples)


def write_examples(path: Path, examples: list[Example]) -> Path:
    write_records(path, examples, Example)
    return path
