"""The numbers of a Qwen2, Qwen3 or Llama 3 folder: `config.json` as a frozen, validated object.

Field names and defaults are transformers' (5.17); what the three families differ in is spelled out, so that the forward
pass asks no names. What would change the result and is not computed here (windows that slide within the model's
positions, dropped or partial rotations, other activations) is refused with file and field, not silently ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from distill.errors import CheckpointError, nearest
from distill.model_folder import read_config_json

FAMILIES = ("qwen2", "qwen3", "llama")
_ROPE_TYPES = ("default", "linear", "llama3")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RopeScaling(_Frozen):
    """Stretch of the rotation frequencies: all by `factor` (linear), or the slow ones alone (Llama 3.1)."""

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        if self.rope_type == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is required by llama3")
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError(f"high_freq_factor must exceed low_freq_factor {self.low_freq_factor}")
        return self


class GqaConfig(_Frozen):
    """Shapes and constants of one model: grouped-query attention, SwiGLU, RMSNorm."""

    model_type: Literal["qwen2", "qwen3", "llama"]
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    max_position_embeddings: int = Field(ge=1)
    rope_theta: float = Field(10_000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(1e-6, gt=0)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _groups_are_whole(self) -> GqaConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            heads = self.num_attention_heads
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} heads")
        return self

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2" or self.attention_bias

    @property
    def o_bias(self) -> bool:
        return self.model_type != "qwen2" and self.attention_bias

    @property
    def norms_heads(self) -> bool:
        """Queries and keys pass an RMSNorm a head before they are rotated."""
        return self.model_type == "qwen3"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


def read_gqa_config(folder: Path) -> GqaConfig:
    """Read and validate a folder's config.json, as `parse_gqa_config` does."""
    return parse_gqa_config(read_config_json(folder), folder / "config.json")


def parse_gqa_config(tree: dict[str, Any], where: Path | str) -> GqaConfig:
    """Validate a config.json's content. Raises CheckpointError naming `where` and the field."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"must be a JSON object, got {type(tree).__name__}", where=where)
    family = tree.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{family!r} is none of these; {nearest(str(family), FAMILIES)}", where=where, field="model_type"
        )
    _refuse(tree, where)
    known = {key: value for key, value in tree.items() if key in GqaConfig.model_fields and value is not None}
    heads = tree.get("num_attention_heads")
    known.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and heads > 0 and isinstance(tree.get("hidden_size"), int):
        known.setdefault("head_dim", 128 if family == "qwen3" else tree["hidden_size"] // heads)
    known.update(_rope_fields(tree, where))
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    try:
        return GqaConfig.model_validate(known)
    except ValidationError as exc:
        fault = exc.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        got = "" if fault["type"] in ("missing", "value_error") else f", got {fault['input']!r}"
        message = "required, but not given" if fault["type"] == "missing" else fault["msg"]
        raise CheckpointError(message.removeprefix("Value error, ") + got, where=where, field=field or None) from exc


def inverse_frequencies(config: GqaConfig) -> Tensor:
    """Angle per position of each pair, FP32 [D/2].

    Llama 3.1 (arXiv 2407.21783; Meta's `apply_scaling`): pairs that turn fewer than `low_freq_factor` times within the
    original context are stretched, those beyond `high_freq_factor` are not, and between the two the stretch fades.
    """
    dim = config.head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert context is not None
    turns = context * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotary_table(config: GqaConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position, FP32 [positions, D/2]."""
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos(), angles.sin()


def _refuse(tree: dict[str, Any], where: Path | str) -> None:
    if tree.get("quantization_config") is not None:
        raise CheckpointError("quantised weights are not read", where=where, field="quantization_config")
    kinds, window, positions = (tree.get(key) for key in ("layer_types", "sliding_window", "max_position_embeddings"))
    if kinds is None:  # transformers' own reading of the older keys
        first = tree.get("max_window_layers", 28)
        slides = bool(tree.get("use_sliding_window")) and first < tree.get("num_hidden_layers", 0)
        kinds = ["sliding_attention"] if slides and tree["model_type"] != "llama" else []
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"only full attention is computed, got {sorted(set(kinds))}", where=where, field="layer_types"
        )
    if "sliding_attention" in kinds and not (isinstance(window, int) and window >= (positions or 0)):
        message = f"layers that see {window} of {positions} positions are not computed"
        raise CheckpointError(message, where=where, field="sliding_window")
    if tree.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError("must be 1: whole heads are rotated", where=where, field="partial_rotary_factor")


def _rope_fields(tree: dict[str, Any], where: Path | str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from their two keys, or from transformers 5's single `rope_parameters`."""
    name = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    source, theta = tree.get(name), tree.get("rope_theta", 10_000.0)
    if source is None:
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(source, dict):
        raise CheckpointError(f"must be an object, got {source!r}", where=where, field=name)
    theta = source.get("rope_theta", theta)
    kind = source.get("rope_type", source.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"must be one of {', '.join(_ROPE_TYPES)}, got {kind!r}", where=where, field=f"{name}.rope_type"
        )
    if source.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError("must be 1: whole heads are rotated", where=where, field=f"{name}.partial_rotary_factor")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: value for key, value in source.items() if key in RopeScaling.model_fields}
    return {"rope_theta": theta, "rope_scaling": scaling | {"rope_type": kind}}
