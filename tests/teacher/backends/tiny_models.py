"""Tiny checkpoint folders with random weights and a character tokenizer."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
TEMPLATES = {"plain": CHATML, "thinking": THINKING}
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder: Path, template: str | None) -> int:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_tiny_model(
    folder: Path, architecture: str = "qwen2", template: str | None = "plain", context: int = 512, seed: int = 0
) -> Path:
    """A model folder of two layers, hidden size 32; `template` is "plain", "thinking" or None."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    size = save_tokenizer(folder, TEMPLATES.get(template))
    config = AutoConfig.for_model(
        architecture,
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        initializer_range=0.3,  # sharp enough that greedy ties do not occur
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return folder
