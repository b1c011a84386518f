"""What the three architectures look like in GGUF: config.json from the metadata, and each tensor's name and shape.

llama.cpp's converter turns rows of queries and keys of a Llama, so that its rotation pairs neighbours where Hugging
Face's pairs halves; and it stores Llama 3.1's stretched frequencies as a tensor of factors, from which the numbers of
config.json are found again. Everything that would change a model's results and cannot be said in config.json is
refused. Names: llama.cpp's gguf-py/gguf/tensor_mapping.py; the turned rows: `permute` in its conversion of Llama.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from distill.errors import nearest
from distill.gguf.header import GgufFile
from distill.gguf.rows import read_rows

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Llama 3.1 and 3.2: the same but for the factor (config.json of meta-llama/Llama-3.1-8B and Llama-3.2-1B).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FACTOR_TOLERANCE = 1e-3  # the file holds them as FP32, computed from FP32 frequencies


class Source(NamedTuple):
    """The GGUF tensor behind one of Hugging Face's; `turned_heads`: heads whose rows are to be turned back."""

    name: str
    shape: tuple[int, ...]
    turned_heads: int | None = None


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json, without `tie_word_embeddings` and the tokens. Raises CheckpointError."""
    family = file.text("general.architecture")
    if family not in ARCHITECTURES:
        message = f"no architecture that is read: {family!r}; {nearest(family, ARCHITECTURES)}"
        raise file.fault(message, "general.architecture")
    hidden = file.integer(f"{family}.embedding_length", least=1)
    heads = file.integer(f"{family}.attention.head_count", least=1)
    head_dim = file.integer(f"{family}.attention.key_length", hidden // heads, least=2)
    if head_dim % 2:
        raise file.fault(f"is {head_dim}: heads are rotated in pairs", f"{family}.attention.key_length")
    layers = file.integer(f"{family}.block_count", least=1)
    positions = file.integer(f"{family}.context_length", least=1)
    if layers > len(file.tensors):
        raise file.fault(f"is {layers}, with {len(file.tensors)} tensors in the file", f"{family}.block_count")
    _refuse(file, family, head_dim=head_dim, positions=positions)
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": _vocab_size(file, hidden),
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{family}.feed_forward_length", least=1),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{family}.attention.head_count_kv", heads, least=1, most=heads),
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rope_theta": file.number(f"{family}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, family, head_dim),
        "rms_norm_eps": file.number(f"{family}.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **_biases(file, family),
    }


def sources(file: GgufFile, config: dict[str, Any], *, tied: bool, embedding: str) -> dict[str, Source]:
    """Every tensor of the checkpoint by its Hugging Face name, with what it is made of.

    Raises CheckpointError for a tensor that is missing, of another shape, or not of this architecture.
    """
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    turns = config["model_type"] == "llama"
    found = {"model.embed_tokens.weight": Source(embedding, (vocabulary, hidden))}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."

        def put(
            name: str, source: str, *shape: int, bias: bool = False, turned: int | None = None,
            ours: str = ours, theirs: str = theirs,
        ) -> None:  # fmt: skip
            found[f"{ours}{name}.weight"] = Source(f"{theirs}{source}.weight", shape, turned)
            if bias:
                found[f"{ours}{name}.bias"] = Source(f"{theirs}{source}.bias", shape[:1], turned)

        biased = config["model_type"] == "qwen2" or config["attention_bias"]
        put("input_layernorm", "attn_norm", hidden)
        put("self_attn.q_proj", "attn_q", queries, hidden, bias=biased, turned=heads if turns else None)
        put("self_attn.k_proj", "attn_k", keys, hidden, bias=biased, turned=kv_heads if turns else None)
        put("self_attn.v_proj", "attn_v", keys, hidden, bias=biased)
        put("self_attn.o_proj", "attn_output", hidden, queries, bias=config.get("attention_bias", False))
        if config["model_type"] == "qwen3":
            put("self_attn.q_norm", "attn_q_norm", config["head_dim"])
            put("self_attn.k_norm", "attn_k_norm", config["head_dim"])
        put("post_attention_layernorm", "ffn_norm", hidden)
        put("mlp.gate_proj", "ffn_gate", inner, hidden, bias=config.get("mlp_bias", False))
        put("mlp.up_proj", "ffn_up", inner, hidden, bias=config.get("mlp_bias", False))
        put("mlp.down_proj", "ffn_down", hidden, inner, bias=config.get("mlp_bias", False))
    found["model.norm.weight"] = Source("output_norm.weight", (hidden,))
    if not tied:
        found["lm_head.weight"] = Source(HEAD, (vocabulary, hidden))
    _check(file, found)
    return found


def _check(file: GgufFile, found: dict[str, Source]) -> None:
    for source in found.values():
        tensor = file.tensors.get(source.name)
        if tensor is None:
            raise file.fault("is missing", source.name)
        if tensor.shape != source.shape:
            raise file.fault(f"has shape {list(tensor.shape)}, must have {list(source.shape)}", source.name)
    known = {source.name for source in found.values()} | {EMBEDDING, HEAD, FREQUENCIES}
    for name in file.tensors:
        if name not in known:
            raise file.fault("is no tensor of this architecture", name)


def _vocab_size(file: GgufFile, hidden: int) -> int:
    tensor = file.tensors.get(EMBEDDING)
    if tensor is None:
        raise file.fault("is missing", EMBEDDING)
    if len(tensor.shape) != 2 or tensor.shape[1] != hidden:
        raise file.fault(f"has shape {list(tensor.shape)}, must have rows of {hidden}", EMBEDDING)
    return tensor.shape[0]


def _refuse(file: GgufFile, family: str, *, head_dim: int, positions: int) -> None:
    """Refuse what the architecture's config.json has no word for."""
    for key, only in (
        ("expert_count", 0),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("attention.sliding_window", positions),
    ):
        value = file.integer(f"{family}.{key}", only)
        if value != only and not (key == "attention.sliding_window" and (value == 0 or value > positions)):
            raise file.fault(f"is {value}: this is computed for {only} alone", f"{family}.{key}")


def _biases(file: GgufFile, family: str) -> dict[str, bool]:
    """Switches of config.json for biases; that of Qwen2's queries, keys and values is part of the architecture."""
    attention = family != "qwen2" and any(f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "k", "v"))
    mlp = any(f"blk.0.ffn_{part}.bias" in file.tensors for part in ("gate", "up", "down"))
    if family == "llama":
        return {"attention_bias": attention, "mlp_bias": mlp}
    return {"attention_bias": attention} if family == "qwen3" else {}


def _rope_scaling(file: GgufFile, family: str, head_dim: int) -> dict[str, Any] | None:
    key = f"{family}.rope.scaling.type"
    kind = file.text(key, "none")
    if kind not in ("none", "linear", "yarn"):
        raise file.fault(f"must be none, linear or yarn, got {kind!r}", key)
    if FREQUENCIES in file.tensors:
        return _llama3_scaling(file, family, head_dim)
    factor = file.number(f"{family}.rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = file.integer(f"{family}.rope.scaling.original_context_length", least=1)
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _llama3_scaling(file: GgufFile, family: str, head_dim: int) -> dict[str, Any] | None:
    """Llama 3.1's numbers behind the factors, one a pair of a head (arXiv 2407.21783; Meta's `apply_scaling`)."""
    tensor = file.tensors[FREQUENCIES]
    if tensor.shape != (head_dim // 2,):
        raise file.fault(f"has shape {list(tensor.shape)}, must have {[head_dim // 2]}", FREQUENCIES)
    factors = read_rows(file, FREQUENCIES).ravel()
    factor = float(factors.max())
    if np.allclose(factors, 1):
        return None
    theta = file.number(f"{family}.rope.freq_base", 10_000.0)
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if not np.allclose(factors, expected, rtol=_FACTOR_TOLERANCE):
        raise file.fault("are not the factors of a Llama 3.1; no other stretch is read", FREQUENCIES)
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3}
