"""The architecture's numbers: `config.json` of a Hugging Face `deepseek_v3` folder as a frozen, validated object.

Field names are Hugging Face's. Keys of a config.json that say nothing about the architecture (torch_dtype, auto_map,
transformers_version) are passed over; a wrong or missing value is a CheckpointError that names the file and the field.
What DeepSeek's code supports but V3 does not use (softmax scores, tied embeddings, attention bias) is refused, not
silently ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.errors import CheckpointError
from distill.model_folder import read_config_json


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class YarnScaling(_Frozen):
    """YaRN context extension (arXiv 2309.00071) as V3 writes it under `rope_scaling`."""

    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = Field(32, gt=0)
    beta_slow: float = Field(1, gt=0)
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(1.0, ge=0)


class DeepseekV3Config(_Frozen):
    """Shapes and constants of one model. `num_nextn_predict_layers` is the depth of MTP (0 or 1)."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    moe_intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    q_lora_rank: int | None = Field(None, ge=1)
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2, multiple_of=2)
    v_head_dim: int = Field(ge=1)
    n_routed_experts: int = Field(ge=1)
    n_shared_experts: int = Field(1, ge=1)
    num_experts_per_tok: int = Field(ge=1)
    n_group: int = Field(1, ge=1)
    topk_group: int = Field(1, ge=1)
    first_k_dense_replace: int = Field(1, ge=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(2.5, gt=0)
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    num_nextn_predict_layers: int = Field(0, ge=0, le=1)
    max_position_embeddings: int = Field(4096, ge=1)
    rope_theta: float = Field(10_000.0, gt=1)
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.006, gt=0)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DeepseekV3Config:
        experts_per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest:
            raise ValueError(f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.n_group > 1 and experts_per_group < 2:
            raise ValueError("a group needs at least two experts: groups are scored by their best two")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * experts_per_group:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.topk_group * experts_per_group} "
                "experts of the chosen groups"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers(self) -> int:
        """Decoder layers in memory, the MTP module's included."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def to_json(self) -> dict[str, Any]:
        """The content of config.json, in V3's own spelling (`rope_theta` beside `rope_scaling`)."""
        tree = self.model_dump(mode="json")
        # Plain rope is written as YaRN with factor 1, the same function: vLLM 0.31's CPU build rotates the plain form
        # wrongly for this architecture (another token at once, on every prompt), the YaRN form rightly.
        scaling = self.rope_scaling or YarnScaling(
            factor=1, original_max_position_embeddings=self.max_position_embeddings
        )
        tree["rope_scaling"] = {"type": "yarn", **scaling.model_dump(mode="json")}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **tree,
            "num_key_value_heads": self.num_attention_heads,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "attention_dropout": 0.0,
            "use_cache": True,
        }


def parse_config(tree: dict[str, Any], where: Path | str) -> DeepseekV3Config:
    """Validate a config.json's content. Raises CheckpointError naming `where` and the field."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"must be a JSON object, got {type(tree).__name__}", where=where)
    if tree.get("model_type") != "deepseek_v3":
        raise CheckpointError(f"must be 'deepseek_v3', got {tree.get('model_type')!r}", where=where, field="model_type")
    for key, wanted in (("moe_layer_freq", 1), ("num_key_value_heads", tree.get("num_attention_heads"))):
        if tree.get(key) not in (None, wanted):
            raise CheckpointError(f"must be {wanted}, got {tree[key]!r}", where=where, field=key)
    known = {key: value for key, value in tree.items() if key in DeepseekV3Config.model_fields}
    if "num_nextn_predict_layers" not in known and "num_mtp_layers" in tree:
        known["num_nextn_predict_layers"] = tree["num_mtp_layers"]
    known.update(_rope_fields(tree, where))
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    try:
        return DeepseekV3Config.model_validate(known)
    except ValidationError as exc:
        fault = exc.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        got = "" if fault["type"] in ("missing", "value_error") else f", got {fault['input']!r}"
        message = "required, but not given" if fault["type"] == "missing" else fault["msg"]
        raise CheckpointError(message.removeprefix("Value error, ") + got, where=where, field=field) from exc


def read_config(folder: Path) -> DeepseekV3Config:
    return parse_config(read_config_json(folder), folder / "config.json")


def _rope_fields(tree: dict[str, Any], where: Path | str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from V3's two keys, or from transformers 5's single `rope_parameters`."""
    source = tree.get("rope_parameters") or tree.get("rope_scaling")
    theta = tree.get("rope_theta", 10_000.0)
    if source is None:
        return {"rope_theta": theta, "rope_scaling": None}
    name = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    if not isinstance(source, dict):
        raise CheckpointError(f"must be an object, got {source!r}", where=where, field=name)
    theta = source.get("rope_theta", theta)
    kind = source.get("rope_type", source.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise CheckpointError(f"must be 'yarn' or 'default', got {kind!r}", where=where, field=f"{name}.rope_type")
    if source.get("attention_factor") is not None:
        raise CheckpointError("is not supported: V3 sets mscale", where=where, field=f"{name}.attention_factor")
    scaling = {key: value for key, value in source.items() if key in YarnScaling.model_fields}
    if "factor" not in scaling and "original_max_position_embeddings" in scaling:
        scaling["factor"] = tree.get("max_position_embeddings", 0) / scaling["original_max_position_embeddings"]
    if scaling.get("factor") == 1:  # YaRN that changes nothing: see to_json
        return {"rope_theta": theta, "rope_scaling": None}
    # What V3 spells out, others leave away: absent means 0 (transformers' meaning), not V3's 1.
    return {"rope_theta": theta, "rope_scaling": {"mscale": 0.0, "mscale_all_dim": 0.0, **scaling}}
