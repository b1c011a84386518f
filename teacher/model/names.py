"""Names and shapes of a Hugging Face checkpoint's tensors, and the way between them and the model's.

In memory an MoE layer's experts are stacked; in a checkpoint each has three matrices. The MTP module's embedding and
head are the main model's; a checkpoint holds copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.model.config import DeepseekV3Config
from teacher.model.transformer import DeepseekV3

Shape = tuple[int, ...]


class TensorLocation(NamedTuple):
    """Home of a checkpoint tensor in the model: a state_dict entry, and the part of it (None: all of it)."""

    entry: str
    expert: int | None = None
    rows: slice = slice(None)


def empty_model(config: DeepseekV3Config) -> DeepseekV3:
    """The model without storage for its weights (meta device)."""
    with torch.device("meta"):
        return DeepseekV3(config)


def places(
    config: DeepseekV3Config, entries: dict[str, Shape], *, first_expert: int = 0
) -> dict[str, tuple[TensorLocation, Shape]]:
    """Every tensor of a checkpoint that `entries` hold -> (its place, its shape), in the order of the layers.

    Stacks begin with the expert `first_expert`.
    """
    inner = config.moe_intermediate_size
    result: dict[str, tuple[TensorLocation, Shape]] = {}
    for entry, shape in entries.items():
        if entry.endswith("experts.gate_up_proj"):
            stem = entry.removesuffix("gate_up_proj")
            for expert in range(shape[0]):
                half, number = (inner, shape[2]), first_expert + expert
                result[f"{stem}{number}.gate_proj.weight"] = TensorLocation(entry, expert, slice(0, inner)), half
                result[f"{stem}{number}.up_proj.weight"] = TensorLocation(entry, expert, slice(inner, 2 * inner)), half
        elif entry.endswith("experts.down_proj"):
            stem = entry.removesuffix("down_proj")
            for expert in range(shape[0]):
                result[f"{stem}{first_expert + expert}.down_proj.weight"] = TensorLocation(entry, expert), shape[1:]
        else:
            result[entry] = TensorLocation(entry), shape
    return result


def mtp_copies(config: DeepseekV3Config) -> dict[str, str]:
    """The MTP module's shared tensors: their name in a checkpoint -> the main model's tensor that they repeat."""
    return {
        f"model.layers.{layer}.{name}": original
        for layer in range(config.num_hidden_layers, config.num_layers)
        for name, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        )
    }


def is_quantised(name: str, shape: Shape) -> bool:
    """Tell whether V3's FP8 format quantises a tensor: projections, not embedding, head, router, norms, eh_proj."""
    kept = ("embed_tokens", "lm_head", "shared_head", "eh_proj", "mlp.gate.", "norm")
    return len(shape) == 2 and not any(part in name for part in kept)


def checkpoint_tensors(
    config: DeepseekV3Config, state: dict[str, Tensor], *, first_expert: int = 0
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(checkpoint name, a function that returns the tensor) for every tensor of `state` to be written, and MTP copies.

    `state` is a model's, or a part of one whose stacks begin with the expert `first_expert`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def part(place: TensorLocation) -> Tensor:
        whole = state[place.entry].detach()
        return whole if place.expert is None else whole[place.expert][place.rows]

    for name, (place, _) in places(config, shapes, first_expert=first_expert).items():
        yield name, lambda place=place: part(place)
    for name, original in mtp_copies(config).items():
        if original in state:
            yield name, lambda original=original: state[original].detach()
