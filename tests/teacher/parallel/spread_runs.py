"""A small V3 model, rows to train it on, and runs of it over layouts and in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from packaging.version import Version

from distill.errors import EnvironmentFault
from distill.packing import Rows
from distill.progress import silent
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import draw_entry
from teacher.model.names import empty_model
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import form_meshes
from teacher.parallel.pipeline.stage import fill
from teacher.train.config import PretrainConfig
from teacher.train.pretrain import Pretraining
from teacher.train.spread import SPLITS_RECOMPUTED, SpreadPretraining, draw_part

ARCHITECTURE = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 4,
    "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 16,
    "initializer_range": 0.1,
}  # fmt: skip
VOCAB_SIZE, ROW_LENGTH, NUM_ROWS = 300, 16, 40
RECOMPUTES_SPLIT = Version(torch.__version__) >= SPLITS_RECOMPUTED
needs_split_recomputation = pytest.mark.skipif(not RECOMPUTES_SPLIT, reason=f"needs torch {SPLITS_RECOMPUTED}")
EXACT = {"dispatch": "fp32", "combine": "fp32"}  # so that only the order of sums differs


def config_of(layout: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    fields: dict[str, Any] = {
        "architecture": ARCHITECTURE, "vocab_size": VOCAB_SIZE, "num_problems": 1, "row_length": 16,
        "rows_per_step": 16, "num_steps": 30, "lr": 1e-2, "warmup_steps": 5, "bias_speed": 1e-3, "balance_alpha": 1e-2,
        "layout": EXACT | (layout or {}),
    }  # fmt: skip
    return PretrainConfig.model_validate(fields | changes)


def architecture(config: PretrainConfig) -> DeepseekV3Config:
    return DeepseekV3Config.model_validate({"vocab_size": config.vocab_size, **config.architecture})


def rows() -> Rows:
    """Sequences that count upwards by 1, 2 or 3; some of their tokens are no targets, so that means are not alike."""
    generator = np.random.default_rng(0)
    start, stride = generator.integers(0, 24, (NUM_ROWS, 1)), generator.integers(1, 4, (NUM_ROWS, 1))
    ids = ((start + stride * np.arange(ROW_LENGTH)) % 24).astype(np.uint16)
    return Rows(ids, np.arange(ROW_LENGTH) >= generator.integers(0, 6, (NUM_ROWS, 1)))


def whole_model(config: PretrainConfig) -> DeepseekV3:
    model = empty_model(architecture(config))
    std = model.config.initializer_range

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return draw_entry(
            name, shape, std=std, seed=config.seed, experts=range(shape[0]) if ".experts." in name else None
        )

    fill(model, model.state_dict(), value)
    return model


def alone(config: PretrainConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Log and weights of the trainer for one process, torch's AdamW and clipping."""
    run = Pretraining(whole_model(config), rows(), config, device=torch.device("cpu"), log_every=1)
    run.experts = "sorted"
    run.run(silent())
    return run.log, run.model.state_dict()


def spread_run(ranks: Ranks, config: PretrainConfig, folder: Path | None = None) -> SpreadPretraining:
    meshes = form_meshes(config.layout, ranks)
    part = draw_part(architecture(config), meshes, seed=config.seed)
    return SpreadPretraining(part, rows(), config, meshes, checkpoint_dir=folder, log_every=1, bf16=False)


class Trained(NamedTuple):
    """What a rank has at the end: its log, its weights and biases, and its parts of the moments."""

    log: list[dict[str, float]]
    held: dict[str, torch.Tensor]
    moments: dict[str, tuple[slice, torch.Tensor, torch.Tensor]]


def trained(ranks: Ranks, config: PretrainConfig, folder: Path | None = None) -> Trained:
    run = spread_run(ranks, config, folder)
    run.run(silent())
    return state_of(run)


def missed(run: SpreadPretraining) -> tuple[str, float]:
    """What ends a run in which a rank dies, and after how many seconds."""
    started = time.monotonic()
    try:
        run.run(silent())
    except EnvironmentFault as fault:
        return str(fault), time.monotonic() - started
    raise AssertionError("nobody was missed")


def state_of(run: SpreadPretraining) -> Trained:
    held = {name: tensor.clone() for name, tensor in run.model.state_dict().items() if not tensor.is_meta}
    parts = {part.name: (part.own, part.exp_avg.clone(), part.exp_avg_sq.clone()) for part in run.optimizer.parts}
    return Trained(run.log, held, parts)


def joined(layout: Layout, results: list[Trained]) -> dict[str, torch.Tensor]:
    """The whole model's weights out of those of all ranks; what several hold must be the same to the last bit."""
    whole: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for rank, of_rank in enumerate(results):
        ep = layout.coordinates(rank).ep
        for name, tensor in of_rank.held.items():
            known, key = (stacks.setdefault(name, {}), ep) if ".experts." in name else (whole, name)
            assert key not in known or torch.equal(known[key], tensor), f"{name} on rank {rank}"
            known[key] = tensor
    return whole | {name: torch.cat([of[ep] for ep in sorted(of)]) for name, of in stacks.items()}


def joined_moments(layout: Layout, results: list[Trained]) -> dict[str, torch.Tensor]:
    """Both moments of every parameter, [2, rows, columns], out of the parts; every number must be there."""
    shapes = {name: tensor.shape for name, tensor in joined(layout, results).items()}
    whole: dict[str, torch.Tensor] = {}
    for rank, of_rank in enumerate(results):
        for name, (columns, *moments) in of_rank.moments.items():
            num_rows = shapes[name][0] if ".experts." in name else 1
            target = whole.setdefault(name, torch.full((2, num_rows, shapes[name].numel() // num_rows), torch.nan))
            first = layout.coordinates(rank).ep * len(moments[0]) if ".experts." in name else 0
            target[:, first : first + len(moments[0]), columns] = torch.stack(moments).float()
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole
