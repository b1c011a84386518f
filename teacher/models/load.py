"""Which architecture a checkpoint folder has, by the `model_type` of its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from distill.errors import CheckpointError, UserInputError, nearest
from distill.model_folder import check_model_folder, read_config_json
from teacher.engine.architecture import Architecture
from teacher.model.checkpoint import check_checkpoint
from teacher.model.config import read_config
from teacher.model.counts import count_parameters
from teacher.models.gqa.config import FAMILIES, read_gqa_config
from teacher.models.gqa.model import GqaModel
from teacher.models.gqa.weights import check_gqa, num_parameters
from teacher.models.invariant.models import InvariantGqaModel, InvariantLatentModel
from teacher.models.latent.model import LatentModel

LATENT = "deepseek_v3"
MODEL_TYPES = (LATENT, *FAMILIES)


class ModelFacts(NamedTuple):
    """Facts of config.json, before a weight is read. `num_active` is parameters that a token meets."""

    model_type: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    num_active: int
    has_mtp: bool


def read_facts(folder: Path) -> ModelFacts:
    """Raises CheckpointError for a config.json that is missing, wrong, or of an architecture that is not served."""
    kind = _model_type(folder)
    if kind == LATENT:
        latent = read_config(folder)
        counts = count_parameters(latent)
        has_mtp = bool(latent.num_nextn_predict_layers)
        return ModelFacts(kind, latent.vocab_size, latent.eos_token_ids, counts.total, counts.active, has_mtp)
    config = read_gqa_config(folder)
    count = num_parameters(config)
    return ModelFacts(kind, config.vocab_size, config.eos_token_ids, count, count, has_mtp=False)


def load_model(
    folder: Path,
    device: torch.device,
    *,
    with_mtp: bool = False,
    batch_invariant: bool = False,
    dtype: torch.dtype | None = None,
) -> Architecture:
    """The folder's model: in FP32 on a CPU; on a GPU in BF16, or in FP8 where folder and GPU are for it.

    `batch_invariant` is for CPUs, `dtype` for students' architectures on them. Raises CheckpointError for anything
    wrong with config or weights, UserInputError for `batch_invariant` or `dtype` where they are not for.
    """
    if dtype is not None and (_model_type(folder) == LATENT or device.type != "cpu"):
        message = f"{dtype} is for {', '.join(FAMILIES)} on a CPU; this is {_model_type(folder)} on a {device.type}"
        raise UserInputError(message, where="teacher", field="dtype")
    if dtype is not None:
        return GqaModel.load(folder, device, dtype)
    if _model_type(folder) == LATENT:
        return (InvariantLatentModel if batch_invariant else LatentModel).load(folder, device, with_mtp=with_mtp)
    return (InvariantGqaModel if batch_invariant else GqaModel).load(folder, device)


def check_weights(folder: Path) -> None:
    """Read every weight once and keep none. Raises CheckpointError for names, shapes and values that are wrong."""
    check_model_folder(folder)
    if _model_type(folder) == LATENT:
        check_checkpoint(folder)
    else:
        check_gqa(folder)


def _model_type(folder: Path) -> str:
    tree = read_config_json(folder)
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind not in MODEL_TYPES:
        message = f"no architecture that is served: {kind!r}; {nearest(str(kind), MODEL_TYPES)}"
        raise CheckpointError(message, where=folder / "config.json", field="model_type")
    return kind
