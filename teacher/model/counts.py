"""The number of parameters of a config, and of those that one token uses; nothing is allocated."""

from __future__ import annotations

from typing import NamedTuple

import torch

from teacher.model.config import DeepseekV3Config
from teacher.model.transformer import DeepseekV3


class ParameterCounts(NamedTuple):
    """`total` and `active` of the main model (embedding and head included); the MTP module's own stand apart."""

    total: int
    active: int
    mtp_total: int
    mtp_active: int


def count_parameters(config: DeepseekV3Config) -> ParameterCounts:
    """Counts for a config. A token uses everything but the routed experts it is not sent to.

    V3 itself: 671.0e9 in all, 37.6e9 active.
    """
    with torch.device("meta"):
        model = DeepseekV3(config)
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    total = {False: 0, True: 0}
    idle = {False: 0, True: 0}
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
    for name, tensor in tensors:
        is_mtp = name.startswith(mtp_prefix)
        total[is_mtp] += tensor.numel()
        if ".experts." in name:
            unused = config.n_routed_experts - config.num_experts_per_tok
            idle[is_mtp] += tensor.numel() // config.n_routed_experts * unused
    return ParameterCounts(total[False], total[False] - idle[False], total[True], total[True] - idle[True])
