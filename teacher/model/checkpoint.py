"""Hugging Face checkpoint folders both ways: BF16, FP32, and DeepSeek-V3's block-scaled FP8.

Loading judges everything first (headers, names, shapes), then reads and checks values, and returns a whole model or
raises a CheckpointError that names file and tensor. Saving writes each file whole or not at all; the folder's other
files (tokenizer, template, generation config) are not touched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from distill.errors import CheckpointError, nearest
from distill.manifest import environment_faults, write_atomically
from distill.model_folder import read_config_json
from distill.weights import INDEX, SINGLE, StoredTensor
from teacher.model.config import DeepseekV3Config, read_config
from teacher.model.fp8 import BLOCK, QUANTIZATION_CONFIG, dequantise_blocks, quantise_blocks, scale_shape
from teacher.model.names import Shape, TensorLocation, checkpoint_tensors, empty_model, is_quantised, mtp_copies, places
from teacher.model.shards import read_tensors, stored_tensors
from teacher.model.transformer import DeepseekV3

SCALE = "_scale_inv"
MAX_SHARD_BYTES = 5_000_000_000


def load_checkpoint(folder: Path | str, dtype: torch.dtype = torch.float32) -> DeepseekV3:
    """The model of a `deepseek_v3` folder on the CPU, weights in `dtype`, FP8 blocks dequantised; in eval mode.

    The routers' correction biases stay FP32. Raises CheckpointError for anything that is missing, unknown, duplicate,
    of a wrong shape, truncated, outside the folder, or not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored, wanted = judged(folder, config, shapes)
    copies = mtp_copies(config)
    state = {
        name: torch.empty(shape, dtype=torch.float32 if "correction_bias" in name else dtype)
        for name, shape in shapes.items()
    }
    shared: dict[str, Tensor] = {}
    for name, tensor in dequantised(stored):
        if name in copies:
            shared[name] = tensor.to(dtype)
            continue
        place, _ = wanted[name]
        target = state[place.entry]
        (target if place.expert is None else target[place.expert][place.rows]).copy_(tensor)
    _check_copies(stored, copies, shared, state)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_checkpoint(folder: Path) -> None:
    """Read every weight and keep none. Raises CheckpointError as `load_checkpoint` does."""
    config = read_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    stored, _ = judged(folder, config, shapes)
    copies = mtp_copies(config)
    twice = {*copies, *copies.values()}
    kept = {name: tensor for name, tensor in dequantised(stored) if name in twice}
    _check_copies(stored, copies, {name: kept[name] for name in copies if name in kept}, kept)


def _check_copies(
    stored: dict[str, StoredTensor], copies: dict[str, str], shared: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    for name, tensor in shared.items():
        if not torch.equal(tensor, state[copies[name]]):
            message = f"differs from {copies[name]}: the MTP module shares it with the main model"
            raise CheckpointError(message, where=stored[name].file, field=name)


def is_fp8_folder(folder: Path | str) -> bool:
    """Tell whether its config.json says that matrices are in blocks of FP8."""
    return read_config_json(Path(folder)).get("quantization_config") is not None


def judged(
    folder: Path, config: DeepseekV3Config, shapes: dict[str, Shape]
) -> tuple[dict[str, StoredTensor], dict[str, tuple[TensorLocation, Shape]]]:
    """The folder's tensors, and the place of each in a model with entries of these shapes, by the headers alone."""
    _check_quantization(folder)
    stored = stored_tensors(folder)
    wanted = places(config, shapes)
    _check_names(folder, config, stored, {name: shape for name, (_, shape) in wanted.items()})
    return stored, wanted


def save_checkpoint(
    model: DeepseekV3,
    folder: Path | str,
    *,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights as `deepseek_v3`.

    `dtype` is that of all weights, with `fp8` of those that V3 leaves unquantised (embedding, head, routers, norms,
    eh_proj); correction biases stay FP32. Weights left in the folder by an earlier save are removed. Raises
    EnvironmentFault for a full disk.
    """
    folder = Path(folder)
    with environment_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(model.config, model.state_dict())
    shards = _shards(encoded(tensors, fp8=fp8, dtype=dtype), max_shard_bytes)
    sizes: list[tuple[list[str], int]] = []
    for number, shard in enumerate(shards, start=1):
        # The number of shards is not known yet, so they are named at the end.
        write_atomically(folder / _unnamed(number), save(shard, metadata={"format": "pt"}))
        sizes.append((list(shard), sum(tensor.nbytes for tensor in shard.values())))
    with environment_faults(folder):
        for old in [folder / INDEX, *folder.glob("model*.safetensors")]:
            old.unlink(missing_ok=True)
        files = [SINGLE] if len(sizes) == 1 else [_named(n, len(sizes)) for n in range(1, len(sizes) + 1)]
        for number, file in enumerate(files, start=1):
            (folder / _unnamed(number)).replace(folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, (names, _) in zip(files, sizes, strict=True) for name in names}
        total = {"total_size": sum(size for _, size in sizes)}
        write_atomically(folder / INDEX, json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n")
    tree = config_json(model.config, fp8=fp8, dtype=dtype)
    write_atomically(folder / "config.json", json.dumps(tree, indent=2) + "\n")


def config_json(config: DeepseekV3Config, *, fp8: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json beside weights that `encoded` gives."""
    tree = config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    return tree | ({"quantization_config": QUANTIZATION_CONFIG} if fp8 else {})


def convert_checkpoint(source: Path | str, target: Path | str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an unquantised copy of a checkpoint, tokenizer and other files included (vLLM's CPU needs BF16)."""
    source, target = Path(source), Path(target)
    # Dequantised in FP32, rounded once: BF16 in between would round twice for FP32 copies.
    save_checkpoint(load_checkpoint(source), target, dtype=dtype)
    with environment_faults(target):
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
                shutil.copyfile(path, target / path.name)


def encoded(
    tensors: Iterable[tuple[str, Callable[[], Tensor]]], *, fp8: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they are stored, one after the other, on the CPU; the arguments are `save_checkpoint`'s."""
    for name, tensor_of in tensors:
        tensor = tensor_of().cpu()
        if not torch.isfinite(tensor).all():
            raise CheckpointError("holds values that are not finite; nothing was written for it", field=name)
        if "correction_bias" in name:
            yield name, tensor.float()
        elif fp8 and is_quantised(name, tuple(tensor.shape)):
            quantised, scale_inv = quantise_blocks(tensor)
            yield name, quantised
            yield name + SCALE, scale_inv
        else:
            yield name, tensor.to(dtype).clone(memory_format=torch.contiguous_format)


def _shards(tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _unnamed(number: int) -> str:
    return f"unnamed-{number:05d}.safetensors"


def _named(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _check_quantization(folder: Path) -> None:
    tree = read_config_json(folder).get("quantization_config")
    if tree is None:
        return
    where = folder / "config.json"
    if not isinstance(tree, dict):
        raise CheckpointError(f"must be an object, got {tree!r}", where=where, field="quantization_config")
    for key, wanted in (("quant_method", "fp8"), ("weight_block_size", [BLOCK, BLOCK])):
        if tree.get(key) != wanted:
            got = tree.get(key)
            raise CheckpointError(f"must be {wanted!r}, got {got!r}", where=where, field=f"quantization_config.{key}")


def _check_names(
    folder: Path, config: DeepseekV3Config, stored: dict[str, StoredTensor], wanted: dict[str, Shape]
) -> None:
    copies = mtp_copies(config)
    allowed = wanted | {name: wanted[original] for name, original in copies.items()}
    for name, tensor in stored.items():
        weight = name.removesuffix(SCALE)
        if weight not in allowed or (name != weight and weight not in stored):
            raise CheckpointError(f"unknown tensor; {nearest(name, allowed)[:200]}", where=tensor.file, field=name)
        shape = allowed[weight] if name == weight else scale_shape(allowed[weight])
        if tensor.shape != shape:
            message = f"must have shape {list(shape)}, got {list(tensor.shape)}"
            raise CheckpointError(message, where=tensor.file, field=name)
        if tensor.dtype == "F8_E4M3" and name + SCALE not in stored:
            raise CheckpointError(f"is FP8 without {name + SCALE}", where=tensor.file, field=name)
        if name != weight and stored[weight].dtype != "F8_E4M3":
            raise CheckpointError(f"scales a tensor of type {stored[weight].dtype}", where=tensor.file, field=name)
    missing = [name for name in wanted if name not in stored]
    if missing:
        prefix = f"model.layers.{config.num_hidden_layers}."
        absent_mtp = missing[0].startswith(prefix) and not any(name.startswith(prefix) for name in stored)
        hint = "; a checkpoint without MTP module says num_nextn_predict_layers 0 in config.json" if absent_mtp else ""
        file = next(iter(stored.values())).file if len({t.file for t in stored.values()}) == 1 else folder / INDEX
        raise CheckpointError(f"missing tensor{hint}", where=file, field=missing[0])


def dequantised(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the type in which it is stored, FP8 as FP32; values checked."""
    scales = dict(read_tensors({name: tensor for name, tensor in stored.items() if name.endswith(SCALE)}))
    for name, scale_inv in scales.items():
        check_finite(stored, name, scale_inv)
    for name, tensor in read_tensors({name: tensor for name, tensor in stored.items() if name not in scales}):
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantise_blocks(tensor, scales[name + SCALE])
        check_finite(stored, name, tensor)
        yield name, tensor


def check_finite(stored: dict[str, StoredTensor], name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        message = f"holds {count} values that are not finite"
        raise CheckpointError(message, where=stored[name].file, field=name)
