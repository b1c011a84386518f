"""A checkpoint folder as an FP8 engine takes it: matrices in their blocks, never dequantised, straight to the device.

Shape legend: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import CheckpointError
from teacher.model.checkpoint import SCALE, check_finite, judged
from teacher.model.config import DeepseekV3Config, read_config
from teacher.model.fp8 import BLOCK, BlockMatrix, quantise_blocks
from teacher.model.names import TensorLocation, empty_model, is_quantised, mtp_copies
from teacher.model.shards import read_tensors

Entry = Tensor | BlockMatrix
_NAN = 0x7F  # E4M3 has no infinities, and one NaN beside its sign


def unfit_for_fp8(config: DeepseekV3Config) -> str | None:
    """The first of the config's widths that tiles of 128 do not fill, or None."""
    names = ["hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"]
    widths = {name: getattr(config, name) for name in names}
    if config.q_lora_rank is not None:
        widths["q_lora_rank"] = config.q_lora_rank
    else:
        widths["num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)"] = (
            config.num_attention_heads * config.qk_head_dim
        )
    widths["num_attention_heads * v_head_dim"] = config.num_attention_heads * config.v_head_dim
    return next((f"{name} {width}" for name, width in widths.items() if width % BLOCK), None)


def read_fp8_config(folder: Path) -> DeepseekV3Config:
    """Raises CheckpointError as `read_config` does, and for widths that blocks of 128 do not fill."""
    config = read_config(folder)
    if (unfit := unfit_for_fp8(config)) is not None:
        raise CheckpointError(f"is no multiple of {BLOCK}, as FP8 needs it", where=folder / "config.json", field=unfit)
    return config


def load_blocks(
    folder: Path | str, device: torch.device, *, experts: Sequence[int] | None = None
) -> tuple[DeepseekV3Config, dict[str, Entry]]:
    """The config, and every entry of the model's state_dict on `device`; of the routed experts those alone that are
    named, in their order, where any are, and no others are read.

    What V3's FP8 format quantises is a BlockMatrix: as the folder holds it, or quantised here from BF16. All else is
    BF16, but for the routers' correction biases, FP32. Raises CheckpointError as `load_checkpoint` does, and for
    widths that blocks of 128 do not fill.
    """
    folder = Path(folder)
    config = read_fp8_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    stored, wanted = judged(folder, config, shapes)
    named = list(range(config.n_routed_experts)) if experts is None else list(experts)
    others = [name for name, (place, _) in wanted.items() if place.expert is not None and place.expert not in named]
    for name in others:
        del wanted[name]
        for part in (name, name + SCALE):
            stored.pop(part, None)
    slots = {expert: [slot for slot, held in enumerate(named) if held == expert] for expert in named}
    shapes |= {
        place.entry: (len(named), *shapes[place.entry][1:]) for place, _ in wanted.values() if place.expert is not None
    }
    entries: dict[str, Entry] = {}
    for name, (place, shape) in wanted.items():
        if place.entry in entries:
            continue
        if is_quantised(name, shape):
            entries[place.entry] = BlockMatrix.empty(shapes[place.entry], device)
        else:
            dtype = torch.float32 if "correction_bias" in name else torch.bfloat16
            entries[place.entry] = torch.empty(shapes[place.entry], dtype=dtype, device=device)
    copies = mtp_copies(config)
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(SCALE)}
    for name, scale_inv in read_tensors(scales):
        check_finite(stored, name, scale_inv)
        for place in _homes(wanted[name.removesuffix(SCALE)][0], slots):
            _part(entries, place).scale_inv.copy_(scale_inv)
    for name, tensor in read_tensors({name: stored[name] for name in stored if name not in scales}):
        if name in copies:  # they repeat the main model's, which is what is used
            continue
        tensor = tensor.to(device)
        if tensor.dtype == torch.float8_e4m3fn:
            if bool(((tensor.view(torch.uint8) & _NAN) == _NAN).any()):
                raise CheckpointError("holds values that are not finite", where=stored[name].file, field=name)
        else:
            check_finite(stored, name, tensor)
        for place in _homes(wanted[name][0], slots):
            _put(entries, place, tensor)
    return config, entries


def _homes(place: TensorLocation, slots: dict[int, list[int]]) -> list[TensorLocation]:
    """The locations in the entries: an expert's is its slot, or slots."""
    return [place] if place.expert is None else [place._replace(expert=slot) for slot in slots[place.expert]]


def _part(entries: dict[str, Entry], place: TensorLocation) -> BlockMatrix:
    entry = entries[place.entry]
    assert isinstance(entry, BlockMatrix)
    if place.expert is not None:
        entry = BlockMatrix(entry.values[place.expert], entry.scale_inv[place.expert])
    return entry.rows(place.rows)


def _put(entries: dict[str, Entry], place: TensorLocation, tensor: Tensor) -> None:
    target = entries[place.entry]
    if isinstance(target, Tensor):
        target.copy_(tensor)
        return
    part = _part(entries, place)
    if tensor.dtype == torch.float8_e4m3fn:
        part.values.copy_(tensor)
    else:
        for of_part, new in zip(part, quantise_blocks(tensor), strict=True):
            of_part.copy_(new)
