"""A student's base: its folder checked, opened with the template, padding and end of turn that will be shipped.

Everything that can be wrong with a checkpoint folder becomes one CheckpointError line here, before training starts:
transformers itself fills missing weights with random numbers, follows an index out of its folder and reads NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
)

from distill.errors import CheckpointError, RecipeError
from distill.model_folder import check_model_folder
from distill.reading.files import read_text
from distill.recipe import Method, StudentConfig
from distill.weights import template_hash, weights_hash
from students.base_folder import locate, resolve_base

__all__ = ["Method", "check_folder", "locate", "open_config", "open_model", "open_tokenizer", "resolve_base"]

# Tokens that published bases leave free for padding, where they name none (Llama 3) or EOS (SmolLM2-Instruct): Llama's,
# then what Qwen and SmolLM2 end documents with, while turns end with another token.
RESERVED_PADS = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
)
ADD, ADDED_PAD = "add", "<|pad|>"  # `pad_token: add`
# Llama 3.2's template writes the day's date into every prompt; this is what it falls back to where it has no clock.
DATE = "'26 Jul 2024'"


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

    `distilled` bakes the student's own template in; `direct` keeps the base's, with `enable_thinking` off where it has
    that, or where the base has none takes the plain twin of the student's (`chatml_think.jinja` ->
    `chatml_plain.jinja`). Raises CheckpointError for a token that the base does not have, RecipeError for a template
    that is not there and for padding that is the end of turn.
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
    _choose_padding(tokenizer, student, folder)
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
    grows = grows_by_padding(student, tokenizer, config.vocab_size)
    if grows:
        config.pad_token_id = None  # no row yet
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
    if grows:
        model.resize_token_embeddings(config.vocab_size + 1, mean_resizing=False)
        model.config.pad_token_id = tokenizer.pad_token_id
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


def grows_by_padding(student: StudentConfig, tokenizer: Tokenizer, num_rows: int) -> bool:
    """Tell whether the padding token that was added is the one token past an embedding of `num_rows` rows."""
    return student.pad_token == ADD and tokenizer.pad_token_id == num_rows


def _choose_padding(tokenizer: Tokenizer, student: StudentConfig, folder: Path) -> None:
    """Padding of its own: what the student names; else the base's unless that ends turns too; else a reserved token."""
    vocabulary = tokenizer.get_vocab()
    if student.pad_token == ADD:
        tokenizer.add_special_tokens({"pad_token": ADDED_PAD})
    elif student.pad_token is not None:
        if student.pad_token not in vocabulary:
            message = f"pad_token {student.pad_token!r} is not in the base's vocabulary; `pad_token: {ADD}` adds one"
            raise CheckpointError(message, where=folder / "tokenizer.json")
        if student.pad_token == tokenizer.eos_token:
            message = f"{student.pad_token!r} ends turns: padding must be another token"
            raise RecipeError(message, where=student.name, field="pad_token")
        tokenizer.pad_token = student.pad_token
    elif tokenizer.pad_token in (None, tokenizer.eos_token):
        free = (token for token in RESERVED_PADS if token in vocabulary and token != tokenizer.eos_token)
        tokenizer.pad_token = next(free, None)


def _template(student: StudentConfig, method: Method, own: str | None) -> str | None:
    if own is not None and (student.chat_template is None or method == "direct"):
        return _settled(own, method) + own
    if student.chat_template is None:
        return None
    name = student.chat_template
    path = locate(name.replace("_think", "_plain") if method == "direct" else name)
    try:
        return read_text(path, RecipeError).removesuffix("\n")
    except RecipeError as exc:
        raise RecipeError(
            f"chat template {str(path)!r} cannot be read", where=student.name, field="chat_template"
        ) from exc


def _settled(template: str, method: Method) -> str:
    """Beginning of the template that is shipped: what `template` asks its caller, answered where the caller is silent.

    So a student is asked as it learned, by whatever program and on whatever day.
    """
    answers = {"enable_thinking": "true" if method == "distilled" else "false", "date_string": DATE}
    return "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}"
        for name, value in answers.items()
        if name in template
    )
