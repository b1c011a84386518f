"""The weights of a Qwen2, Qwen3 or Llama 3 folder, laid out for inference: QKV in one matrix, gate over up in another.

Headers are judged first: names and shapes. Then tensors are read one by one, checked, and copied to their place on the
device in the type that is asked for, so that no more than one of them is in memory twice.

Shape legend: D hidden, X queries, keys and values of all heads, I intermediate, V vocabulary, A width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.errors import CheckpointError, nearest
from distill.weights import INDEX, StoredTensor
from teacher.model.checkpoint import check_finite
from teacher.model.shards import read_tensors, stored_tensors
from teacher.models.arithmetic import pack, packs
from teacher.models.gqa.config import GqaConfig, read_gqa_config, rotary_table


@dataclass(frozen=True)
class Linear:
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class GqaLayer:
    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None  # of each head, [A]
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class GqaWeights:
    """`head` is `embedding` where they are tied and matrices not packed; cos and sin are FP32 [positions, A/2]."""

    config: GqaConfig
    embedding: Tensor
    layers: tuple[GqaLayer, ...]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor


class _Place(NamedTuple):
    """Place of a tensor of the folder: an entry of the fused state, from a row on."""

    entry: str
    first_row: int
    shape: tuple[int, ...]


def load_gqa(folder: Path, device: torch.device, dtype: torch.dtype, *, packed: bool = False) -> GqaWeights:
    """The folder's weights; `packed`: matrices as `teacher.models.arithmetic.linear` takes them fastest on a CPU.

    Raises CheckpointError for anything that is missing, unknown, duplicate, of a wrong shape, truncated, outside the
    folder, or not finite."""
    config = read_gqa_config(folder)
    places = _places(config)
    stored = _judged(folder, config, places)
    rows: dict[str, int] = {}
    for place in places.values():
        rows[place.entry] = max(rows.get(place.entry, 0), place.first_row + place.shape[0])
    state = {
        place.entry: torch.empty(rows[place.entry], *place.shape[1:], dtype=dtype, device=device)
        for place in places.values()
    }
    for name, tensor in read_tensors(stored):
        check_finite(stored, name, tensor)
        place = places[name]
        state[place.entry][place.first_row : place.first_row + place.shape[0]].copy_(tensor)
    return _assembled(config, state, packed=packed and packs(device, dtype))


def check_gqa(folder: Path) -> None:
    """Read every weight and keep none. Raises CheckpointError as `load_gqa` does."""
    config = read_gqa_config(folder)
    stored = _judged(folder, config, _places(config))
    for name, tensor in read_tensors(stored):
        check_finite(stored, name, tensor)


def num_parameters(config: GqaConfig) -> int:
    """Tied embeddings counted once."""
    return sum(prod(place.shape) for place in _places(config).values())


def _places(config: GqaConfig) -> dict[str, _Place]:
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    places = {
        "model.embed_tokens.weight": _Place("embedding", 0, (vocabulary, hidden)),
        "model.norm.weight": _Place("norm", 0, (hidden,)),
    }
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = _Place("head", 0, (vocabulary, hidden))
    for index in range(config.num_hidden_layers):
        prefix, entry = f"model.layers.{index}.", f"{index}."

        def put(
            name: str, target: str, row: int, *shape: int, bias: bool = False, prefix: str = prefix, entry: str = entry
        ) -> None:
            places[f"{prefix}{name}.weight"] = _Place(entry + target, row, shape)
            if bias:
                places[f"{prefix}{name}.bias"] = _Place(f"{entry}{target}.bias", row, shape[:1])

        put("input_layernorm", "attention_norm", 0, hidden)
        put("post_attention_layernorm", "mlp_norm", 0, hidden)
        put("self_attn.q_proj", "qkv", 0, queries, hidden, bias=config.qkv_bias)
        put("self_attn.k_proj", "qkv", queries, keys, hidden, bias=config.qkv_bias)
        put("self_attn.v_proj", "qkv", queries + keys, keys, hidden, bias=config.qkv_bias)
        put("self_attn.o_proj", "o", 0, hidden, queries, bias=config.o_bias)
        put("mlp.gate_proj", "gate_up", 0, inner, hidden, bias=config.mlp_bias)
        put("mlp.up_proj", "gate_up", inner, inner, hidden, bias=config.mlp_bias)
        put("mlp.down_proj", "down", 0, hidden, inner, bias=config.mlp_bias)
        if config.norms_heads:
            put("self_attn.q_norm", "q_norm", 0, config.head_dim)
            put("self_attn.k_norm", "k_norm", 0, config.head_dim)
    return places


def _judged(folder: Path, config: GqaConfig, places: dict[str, _Place]) -> dict[str, StoredTensor]:
    """The folder's tensors that are read, with the names and shapes that they must have."""
    stored = {name: tensor for name, tensor in stored_tensors(folder).items() if not _is_ignored(config, name)}
    _check_names(folder, stored, places)
    return stored


def _is_ignored(config: GqaConfig, name: str) -> bool:
    """Frequencies are computed; a tied head that is stored as well is not read, as transformers does not read it."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _check_names(folder: Path, stored: dict[str, StoredTensor], places: dict[str, _Place]) -> None:
    for name, tensor in stored.items():
        if name not in places:
            raise CheckpointError(f"unknown tensor; {nearest(name, places)[:200]}", where=tensor.file, field=name)
        if tensor.shape != places[name].shape:
            message = f"must have shape {list(places[name].shape)}, got {list(tensor.shape)}"
            raise CheckpointError(message, where=tensor.file, field=name)
        if tensor.dtype == "F8_E4M3":
            raise CheckpointError("has type F8_E4M3; quantised weights are not read", where=tensor.file, field=name)
    for name in places:
        if name not in stored:
            files = {tensor.file for tensor in stored.values()}
            where = files.pop() if len(files) == 1 else folder / INDEX
            raise CheckpointError("missing tensor", where=where, field=name)


def _assembled(config: GqaConfig, state: dict[str, Tensor], *, packed: bool) -> GqaWeights:
    def linear(name: str) -> Linear:
        weight = state.pop(name)  # as it was read, it need not outlast its packing
        return Linear(pack(weight) if packed else weight, state.get(f"{name}.bias"))

    layers = tuple(
        GqaLayer(
            attention_norm=state[f"{index}.attention_norm"],
            qkv=linear(f"{index}.qkv"),
            q_norm=state.get(f"{index}.q_norm"),
            k_norm=state.get(f"{index}.k_norm"),
            o=linear(f"{index}.o"),
            mlp_norm=state[f"{index}.mlp_norm"],
            gate_up=linear(f"{index}.gate_up"),
            down=linear(f"{index}.down"),
        )
        for index in range(config.num_hidden_layers)
    )
    embedding = state["embedding"]
    head = state.pop("head", embedding)
    if packed:
        head = pack(head.float())  # logits are computed in FP32
    cos, sin = (table.to(embedding.device) for table in rotary_table(config))
    return GqaWeights(config, embedding, layers, state["norm"], head, cos, sin)
