"""Implementations of others, each taken only where it can be imported and fits the device."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.kernels.case import Peer, PeerMissing


def vllm_missing(device: torch.device) -> PeerMissing | None:
    if device.type != "cuda":
        return PeerMissing("needs a GPU")
    if importlib.util.find_spec("vllm") is None:
        return PeerMissing("vllm is not installed")
    return None


def group_quantise(device: torch.device) -> Peer | PeerMissing:
    """vLLM's quantisation in tiles of 1x128, scales column by column as ours."""
    if missing := vllm_missing(device):
        return missing
    try:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8
    except ImportError as error:
        return PeerMissing(str(error))

    def run(inputs: tuple[torch.Tensor]) -> Any:
        return per_token_group_quant_fp8(inputs[0], 128, column_major_scales=True, use_ue8m0=False)

    return Peer(run)
