"""Fresh weights as DeepSeek-V3 draws them (s.4.2): normal with one standard deviation, norms at 1, biases at 0."""

from __future__ import annotations

import torch
from torch import nn

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
