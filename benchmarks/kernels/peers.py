"""Implementations of others, each taken only where it can be imported and fits the device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Peer, PeerMissing
from teacher.model.fp8 import BLOCK

if TYPE_CHECKING:
    from benchmarks.kernels.inputs import Operands, Tokens
    from teacher.kernels.moe.reference import ExpertWeights
    from teacher.kernels.moe.route_reference import Routes

FP8_UTILITIES = "vllm.model_executor.layers.quantization.utils.fp8_utils"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def from_vllm(device: torch.device, **places: str) -> SimpleNamespace | PeerMissing:
    """vLLM's objects by the names given them here, from "module:name"; or why they cannot be had."""
    if device.type != "cuda":
        return PeerMissing("needs a GPU")
    if importlib.util.find_spec("vllm") is None:
        return PeerMissing("vllm is not installed")
    # Where vLLM finds DeepGEMM it rounds every scale to a power of two, for its Triton kernels too: another result.
    os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")
    try:
        return SimpleNamespace(
            **{
                ours: getattr(importlib.import_module(module), name)
                for ours, (module, name) in ((ours, place.split(":")) for ours, place in places.items())
            }
        )
    except (ImportError, AttributeError) as error:
        return PeerMissing(str(error))


def group_quantise(device: torch.device) -> Peer | PeerMissing:
    """vLLM's quantisation in tiles of 1x128, scales column by column as ours."""
    vllm = from_vllm(device, quantise=f"{FP8_UTILITIES}:per_token_group_quant_fp8")
    if isinstance(vllm, PeerMissing):
        return vllm

    def run(inputs: tuple[Tensor]) -> Any:
        return vllm.quantise(inputs[0], BLOCK, column_major_scales=True, use_ue8m0=False)

    return Peer(run)


def cutlass_block_gemm(device: torch.device, tolerance: float) -> Peer | PeerMissing:
    vllm = from_vllm(device, product="vllm._custom_ops:cutlass_scaled_mm")
    if isinstance(vllm, PeerMissing):
        return vllm

    def run(given: Operands) -> Tensor:
        (values, scales), weight, weight_scales = given
        return vllm.product(values, weight.t(), scales, weight_scales.t(), out_dtype=torch.bfloat16)

    return Peer(run, tolerance=tolerance)


def triton_block_gemm(device: torch.device, tolerance: float) -> Peer | PeerMissing:
    vllm = from_vllm(device, product=f"{FP8_UTILITIES}:w8a8_triton_block_scaled_mm")
    if isinstance(vllm, PeerMissing):
        return vllm

    def run(given: Operands) -> Tensor:
        (values, scales), *weight = given
        return vllm.product(values, weight[0], scales, weight[1], [BLOCK, BLOCK], torch.bfloat16)

    return Peer(run, tolerance=tolerance)


def vllm_experts(device: torch.device, weights: ExpertWeights, routes: Routes, tolerance: float) -> Peer | PeerMissing:
    """vLLM's router, quantisation and Triton experts, with its own choice of tiles for the device."""
    vllm = from_vllm(
        device,
        config=f"{FUSED_MOE}.config:fp8_w8a8_moe_quant_config",
        experts=f"{FUSED_MOE}.fused_moe:fused_experts",
        route=f"{FUSED_MOE}.router.grouped_topk_router:fused_grouped_topk",
    )
    if isinstance(vllm, PeerMissing):
        return vllm
    gate_up, gate_up_scales, down, down_scales = weights
    config = vllm.config(gate_up_scales, down_scales, block_shape=[BLOCK, BLOCK])

    def run(given: Tokens) -> Tensor:
        x, logits, bias = given
        chosen = vllm.route(
            x, logits, routes.num_experts_per_tok, routes.norm_topk_prob, bias, routes.n_group, routes.topk_group,
            scoring_func="sigmoid", routed_scaling_factor=routes.routed_scaling_factor,
        )  # fmt: skip
        return vllm.experts(x, gate_up, down, *chosen, quant_config=config)

    return Peer(run, tolerance=tolerance)
