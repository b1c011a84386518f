"""Matrix products in block-scaled FP8, as DeepSeek-V3 runs them (arXiv 2412.19437 s.3.3.2): `teacher.kernels`.

Weights in E4M3 blocks of 128x128, activations quantised in tiles of 1x128 on the way out of the norm before them. The
router reads the norm in BF16, its logits are FP32; embedding and head stay in BF16.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from teacher.kernels.dense.gemm import block_gemm
from teacher.kernels.moe.experts import routed_experts_fp8
from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Choice, Routes
from teacher.kernels.quantise.quantise import quantise, rms_norm_quantise, swiglu_quantise
from teacher.kernels.quantise.reference import Quantised
from teacher.model.block_checkpoint import Entry
from teacher.model.config import DeepseekV3Config
from teacher.model.fp8 import BlockMatrix
from teacher.models.arithmetic import fp32_product
from teacher.models.latent.weights import Fp8MoEWeights, MLPWeights


class Input(NamedTuple):
    """`normed_MD` for the router, where experts follow."""

    quantised: Quantised
    normed_MD: Tensor | None


class Fp8Products:
    """`teacher.models.latent.products.Products`; where no kernel runs, the kernels' twins do: right, and slow."""

    def __init__(self, config: DeepseekV3Config) -> None:
        self._routes = Routes.of(config)

    def norm(
        self, x_MD: Tensor, weight: Tensor, eps: float, *, add_MD: Tensor | None = None, for_experts: bool = False
    ) -> tuple[Tensor, Input]:
        normed = rms_norm_quantise(x_MD, weight, eps, add_MK=add_MD, keep_normed=for_experts)
        return normed.residual_MK, Input(normed.quantised, normed.normed_MK)

    def enter(self, x_MK: Tensor) -> Input:
        return Input(quantise(x_MK), None)

    def linear(self, x: Input, weight: Entry) -> Tensor:
        assert isinstance(weight, BlockMatrix)
        return block_gemm(x.quantised, weight.values, weight.scale_inv)

    def mlp(self, x: Input, weights: MLPWeights) -> Tensor:
        gate_up = self.linear(x, weights.gate_up)
        return self.linear(Input(swiglu_quantise(gate_up), None), weights.down)

    def experts(self, x: Input, weights: Fp8MoEWeights) -> Tensor:
        routed = routed_experts_fp8(x.quantised, self._choice(x, weights), weights.experts)
        return routed + self.mlp(x, weights.shared)

    def _choice(self, x: Input, weights: Fp8MoEWeights) -> Choice:
        assert x.normed_MD is not None
        return route(fp32_product(x.normed_MD, weights.router_ED), weights.bias_E, self._routes)
