"""A student's base: its folder checked, opened with the template, padding and end of turn that will be shipped.

Everything that can be wrong with a checkpoint folder becomes one CheckpointError line here, before training starts:
transformers itself fills missing weights with random numbers, follows an index out of its folder and reads NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from distill.errors import CheckpointError, RecipeError
from distill.model_folder import check_model_folder
from distill.reading.files import read_text
from distill.recipe import StudentConfig
from distill.weights import template_hash, weights_hash
from students.base_folder import locate, resolve_base

__all__ = ["Method", "check_folder", "locate", "open_config", "open_model", "open_tokenizer", "resolve_base"]

Method = Literal["distilled", "direct"]

# Tokens that published bases reserve for padding, for a tokenizer that names none (Llama 3).
RESERVED_PADS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "<pad>")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for what `distill.model_folder` refuses: code, absurd sizes, weights that are not whole."""
    check_model_folder(folder)


def open_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # the folder's values may bring out anything
        raise CheckpointError(f"not a readable model config ({exc})", where=folder / "config.json") from exc


def open_tokenizer(student: StudentConfig, method: Method, folder: Path) -> Tokenizer:
    """The base's tokenizer with the end of turn, padding and chat template of the checkpoint to be shipped.

    `distilled` bakes the student's own template in; `direct` keeps the base's, or where the base has none takes the
    plain twin of the student's (`chatml_think.jinja` -> `chatml_plain.jinja`).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # `tokenizers` raises nothing more precise
        raise CheckpointError(f"not a readable tokenizer ({exc})", where=folder) from exc
    if student.eos_token is not None:
        if student.eos_token not in tokenizer.get_vocab():
            raise CheckpointError(
                f"eos_token {student.eos_token!r} is not in the base's vocabulary", where=folder / "tokenizer.json"
            )
        tokenizer.eos_token = student.eos_token
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        free = (token for token in RESERVED_PADS if token in vocabulary and token != tokenizer.eos_token)
        tokenizer.pad_token = next(free, None)
    template = _template(student, method, tokenizer.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def open_model(student: StudentConfig, folder: Path, tokenizer: Tokenizer) -> PreTrainedModel:
    """The base in float32 (the master weights), with special tokens and rope theta of the student. No dropout.

    Raises CheckpointError for a shard that is missing, a shape that does not fit, or a weight that is not finite.
    """
    check_folder(folder)
    config = open_config(folder)
    adapt_config(config, student, tokenizer)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as exc:
        raise CheckpointError(f"the weights cannot be loaded ({exc})", where=folder) from exc
    for fault in ("missing_keys", "mismatched_keys"):
        if info.get(fault):
            names = sorted(str(key) for key in info[fault])
            raise CheckpointError(f"{len(names)} weights {fault.split('_')[0]}", where=folder, field=names[0])
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError("has values that are not finite", where=folder, field=name)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def adapt_config(config: PreTrainedConfig, student: StudentConfig, tokenizer: Tokenizer) -> None:
    """Lay the student's rope theta, positions and special tokens over the base's config."""
    if student.sft.rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": student.sft.rope_theta}
        config.max_position_embeddings = max(config.max_position_embeddings, student.sft.max_length)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.use_cache = True


def identity(folder: Path) -> dict[str, Any]:
    """Hashes of what tells one base from another: weights with their configs, tokenizer with its template."""
    return {"weights": weights_hash(folder), "template": template_hash(folder)}


def _template(student: StudentConfig, method: Method, own: str | None) -> str | None:
    if student.chat_template is None or (method == "direct" and own is not None):
        return own
    name = student.chat_template
    path = locate(name.replace("_think", "_plain") if method == "direct" else name)
    try:
        return read_text(path, RecipeError).removesuffix("\n")
    except RecipeError as exc:
        raise RecipeError(
            f"chat template {str(path)!r} cannot be read", where=student.name, field="chat_template"
        ) from exc
