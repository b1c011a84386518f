"""Fresh weights as DeepSeek-V3 draws them (s.4.2): normal with one standard deviation, norms at 1, biases at 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from teacher.model.norm import RMSNorm
from teacher.model.router import Router
from teacher.model.transformer import DeepseekV3


@torch.no_grad()
def initialise(model: DeepseekV3, *, std: float | None = None, generator: torch.Generator | None = None) -> DeepseekV3:
    """Draw every weight of `model` in place and return it. `std` defaults to the config's initializer_range."""
    std = model.config.initializer_range if std is None else std
    for module in model.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
            continue
        if isinstance(module, Router):
            nn.init.zeros_(module.e_score_correction_bias)
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, 0.0, std, generator=generator)
    return model


def draw_entry(
    name: str, shape: tuple[int, ...], *, std: float, seed: int, experts: Iterable[int] | None = None
) -> Tensor:
    """One entry of a model's state, FP32, by its name alone: every rank draws its part of one and the same model.

    `experts` are those of a stack [E, ...], each drawn by itself.
    """
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if experts is not None:
        return torch.stack([_normal(f"{name}.{expert}", shape[1:], std, seed) for expert in experts])
    return _normal(name, shape, std, seed)


def _normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
