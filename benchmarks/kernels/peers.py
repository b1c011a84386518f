"""Implementations of others, each taken only where it can be imported and fits the device."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Peer, PeerMissing
from teacher.model.fp8 import BLOCK

if TYPE_CHECKING:
    from benchmarks.kernels.dense import Operands
    from benchmarks.kernels.moe import Tokens
    from teacher.kernels.experts import ExpertWeights
    from teacher.kernels.route import Routes


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

    def run(inputs: tuple[Tensor]) -> Any:
        return per_token_group_quant_fp8(inputs[0], BLOCK, column_major_scales=True, use_ue8m0=False)

    return Peer(run)


def cutlass_block_gemm(device: torch.device, tolerance: float) -> Peer | PeerMissing:
    if missing := vllm_missing(device):
        return missing
    try:
        from vllm import _custom_ops as operations
    except ImportError as error:
        return PeerMissing(str(error))

    def run(given: Operands) -> Tensor:
        (values, scales), weight, weight_scales = given
        return operations.cutlass_scaled_mm(values, weight.t(), scales, weight_scales.t(), out_dtype=torch.bfloat16)

    return Peer(run, tolerance=tolerance)


def triton_block_gemm(device: torch.device, tolerance: float) -> Peer | PeerMissing:
    if missing := vllm_missing(device):
        return missing
    try:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import w8a8_triton_block_scaled_mm
    except ImportError as error:
        return PeerMissing(str(error))

    def run(given: Operands) -> Tensor:
        (values, scales), *weight = given
        return w8a8_triton_block_scaled_mm(values, weight[0], scales, weight[1], [BLOCK, BLOCK], torch.bfloat16)

    return Peer(run, tolerance=tolerance)


def vllm_experts(device: torch.device, weights: ExpertWeights, routes: Routes, tolerance: float) -> Peer | PeerMissing:
    """vLLM's router, quantisation and Triton experts, with its own choice of tiles for the device."""
    if missing := vllm_missing(device):
        return missing
    try:
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import fused_grouped_topk
    except ImportError as error:
        return PeerMissing(str(error))
    gate_up, gate_up_scales, down, down_scales = weights
    config = fp8_w8a8_moe_quant_config(gate_up_scales, down_scales, block_shape=[BLOCK, BLOCK])

    def run(given: Tokens) -> Tensor:
        x, logits, bias = given
        chosen = fused_grouped_topk(
            x, logits, routes.num_experts_per_tok, routes.norm_topk_prob, bias, routes.n_group, routes.topk_group,
            scoring_func="sigmoid", routed_scaling_factor=routes.routed_scaling_factor,
        )  # fmt: skip
        return fused_experts(x, gate_up, down, *chosen, quant_config=config)

    return Peer(run, tolerance=tolerance)
