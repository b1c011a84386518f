"""Hugging Face folders written over a layout: every rank writes the tensors that it holds.

What several replicas hold is written by the first of them. The result is the folder that one process would write, in
other files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from distill.manifest import write_atomically
from distill.weights import INDEX
from teacher.model.checkpoint import config_json, encoded
from teacher.model.names import checkpoint_tensors
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import lost_peers
from teacher.parallel.meshes import Meshes
from teacher.parallel.pipeline.stage import EMBEDDING, own_entries


def save_parts(
    model: DeepseekV3, folder: Path, meshes: Meshes, *, fp8: bool = False, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a `deepseek_v3` folder, config.json last. Collective; all ranks must see the same file system.

    `fp8` and `dtype` as in `save_checkpoint`. Raises CheckpointError for values that are not finite, EnvironmentFault
    for a full disk or a lost rank.
    """
    world, config = meshes.world, model.config
    first = meshes.layout.placement(config.n_routed_experts).of_rank(meshes.at.ep)[0]
    own = checkpoint_tensors(config, _to_write(model, meshes), first_expert=first)
    tensors = dict(encoded(own, fp8=fp8, dtype=dtype))
    file = f"model-{meshes.rank + 1:05d}-of-{meshes.layout.num_ranks:05d}.safetensors"
    if tensors:
        write_atomically(folder / file, save(tensors, metadata={"format": "pt"}))
    said: list[Any] = [None] * meshes.layout.num_ranks
    with lost_peers(world):
        size = sum(tensor.nbytes for tensor in tensors.values())
        dist.all_gather_object(said, (file, list(tensors), size), group=world)
    if meshes.rank == 0:
        weight_map = {name: file for file, names, _ in said for name in names}
        index = {"metadata": {"total_size": sum(size for _, _, size in said)}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
        write_atomically(folder / "config.json", json.dumps(config_json(config, fp8=fp8, dtype=dtype), indent=2) + "\n")
    with lost_peers(world):
        dist.barrier(group=world)


def _to_write(model: DeepseekV3, meshes: Meshes) -> dict[str, Tensor]:
    """Entries that this rank is the first to hold."""
    state = model.state_dict()
    own = {name: state[name] for name in own_entries(model, meshes.layout, meshes.at.pp)}
    return {
        name: tensor
        for name, tensor in own.items()
        if (meshes.at.dp if ".experts." in name else meshes.replica) == 0
        and (name != EMBEDDING or meshes.at.pp == 0)  # the last stage has a copy for its MTP module
    }
