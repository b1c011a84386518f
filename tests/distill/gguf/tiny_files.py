"""Tiny models as checkpoint folders and, through `gguf`'s writer and name maps, as the GGUF files made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2Tokenizer, Qwen3Config
from transformers.convert_slow_tokenizer import TikTokenConverter

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "What is 12 * 345 + 6789? It's 4,210,929!\n\n  Then we're done.\t(x-1)^2",
    "zebra nai\u0308ve café ½ ﬁ — 你好 世界\r\n\r\nemoji 🙂🙃 and  spaces   ",
    "<|im_start|>user\nHello<|im_end|>",
]
CORPUS = [
    *TEXTS,
    "the question then is 1234 plus 1234 equals 12, 12, 12",
    "we add and we add and then we're there " * 4,
]


def qwen2_tokenizer() -> Tokenizer:
    """As transformers' own class splits and normalises; vocabulary and merges trained on a few lines."""
    raw = Tokenizer(models.BPE())
    split = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    vocabulary, merges = _trained(raw, split)
    return _with_specials(Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer, vocabulary, CHATML)


def llama3_tokenizer() -> Tokenizer:
    """As transformers converts Llama 3's, with the token that begins a text."""
    pattern = TikTokenConverter(vocab_file="unread").pattern
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary, merges = _trained(Tokenizer(models.BPE()), split)
    vocabulary["zebra"] = len(vocabulary)  # a word that no merges lead to
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer = _with_specials(tokenizer, vocabulary, LLAMA3)
    begin = (LLAMA3[0], tokenizer.token_to_id(LLAMA3[0]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[LLAMA3[0], "$A"], pair=[LLAMA3[0], "$A", "$B"], special_tokens=[begin]
    )
    return tokenizer


def smollm_tokenizer() -> Tokenizer:
    """As published with SmolLM2: single digits, then GPT-2's split."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # Trained without the first, so that it has tokens of several digits to leave alone.
    vocabulary, merges = _trained(Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return _with_specials(tokenizer, vocabulary, CHATML)


def make_model(family: str, vocab_size: int, *, seed: int = 0, tied: bool = True, **config: Any) -> PreTrainedModel:
    """Two layers, grouped heads, weights that are BF16 numbers; norms and biases that are not their initial values."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if family == "qwen3" else 16,
        "max_position_embeddings": 256,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**{**settings, **config}), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.copy_(torch.randn_like(parameter) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
        parameter.data.copy_(parameter.data.bfloat16().float())
    return model


def rounded(model: PreTrainedModel, kinds: dict[str, Kind]) -> None:
    """Replace each weight by what its quantisation leaves of it, in BF16: what a reader must find."""
    for name, parameter in model.named_parameters():
        values = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kinds[name]), kinds[name])
        parameter.data.copy_(torch.from_numpy(np.array(values)).bfloat16().float())


def kinds_of(model: PreTrainedModel, matrices: Kind) -> dict[str, Kind]:
    """Matrices of one quantisation, vectors in FP32, as llama.cpp does."""
    return {name: matrices if parameter.ndim > 1 else Kind.F32 for name, parameter in model.named_parameters()}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    pre: str,
    matrices: Kind = Kind.F16,
    extra: dict[str, tuple[np.ndarray, Kind]] | None = None,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """The model as llama.cpp's converter lays it out; `metadata` overrides fields, `leave_out` drops some.

    `extra` adds or replaces tensors, under their GGUF names.
    """
    config = model.config
    family = config.model_type
    fields: dict[str, Any] = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim if family != "qwen2" else 16,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.chat_template": TEMPLATE,
        **tokenizer_fields(tokenizer, config.vocab_size),
    }
    fields |= metadata or {}
    writer = gguf.GGUFWriter(path, family)
    for key, value in fields.items():
        if key not in leave_out:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config.num_hidden_layers)
    tensors = dict(extra or {})
    for name, parameter in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        values = parameter.detach().numpy()
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = turned(values, heads)
        kind = matrices if values.ndim > 1 else Kind.F32
        tensors.setdefault(f"{names.get_name(stem)}.{ending}", (values, kind))
    for name, (values, kind) in tensors.items():
        if name not in leave_out:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def turned(values: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's conversion of Llama."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def tokenizer_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Vocabulary, kinds, merges and the special ids; unused tokens up to `vocab_size`, as in Qwen's files."""
    state = json.loads(tokenizer.to_str())
    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    kinds = [{True: 3, False: 4, None: 1}[added.get(token)] for token in tokens]
    unused = vocab_size - len(tokens)
    ids = {name: tokenizer.token_to_id(token) for name, token in zip(("pad", "start", "end"), added, strict=False)}
    fields = {
        "tokenizer.ggml.tokens": tokens + [f"[PAD{index}]" for index in range(unused)],
        "tokenizer.ggml.token_type": kinds + [5] * unused,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": ids["end"],
    }
    if "<|begin_of_text|>" in added:
        return fields | {"tokenizer.ggml.bos_token_id": ids["pad"]}
    return fields | {"tokenizer.ggml.padding_token_id": ids["pad"], "tokenizer.ggml.add_bos_token": False}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _trained(raw: Tokenizer, split: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    raw.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    state = json.loads(raw.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def _with_specials(tokenizer: Tokenizer, vocabulary: dict[str, int], specials: tuple[str, ...]) -> Tokenizer:
    """Special tokens after the vocabulary, and one that is plain text, as Qwen's `<tool_call>`."""
    assert max(vocabulary.values()) == len(vocabulary) - 1
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer
