"""Both architectures in a form that is batch-invariant on a CPU: the same request has the same logits to the last bit
and the same tokens, whatever shares its batch, however its prompt is cut into chunks, and whether a page was computed
for it, for another or again after it had to wait.

Products run in tiles of fixed height (`invariant`), attention page by page (`invariant_attention`), both in one thread.
The teacher's attention is absorbed throughout: the expanded form is another order of summation.

Shape legend: as in `latent_model` and `grouped_model`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserInputError
from teacher.engine.step import Decodes, Step
from teacher.models.gqa.model import GqaModel
from teacher.models.gqa.operations import PlainGqa
from teacher.models.gqa.weights import GqaWeights, Linear
from teacher.models.invariant.arithmetic import (
    EXPERT_TILE,
    by_tiles,
    check_matrices,
    check_places,
    linear,
    one_thread,
    silu,
)
from teacher.models.invariant.attention import Level, attend_levels, with_plan
from teacher.models.latent.model import LatentModel
from teacher.models.latent.plain import PlainOperations
from teacher.models.latent.products import PlainProducts
from teacher.models.latent.weights import AttentionWeights, InferenceWeights, MLPWeights, MoEWeights

INVARIANT = "float32-invariant"


class _Invariant:
    """Before an architecture among a model's bases."""

    @property
    def precision(self) -> str:
        return INVARIANT

    def plan(self, decodes: Decodes) -> None:
        """All rows of a step are planned together, in `hidden`."""

    @one_thread()
    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        return super().hidden(with_plan(step, self.dtype), entries_LPSE)

    @one_thread()
    def logits(self, x_ZD: Tensor) -> Tensor:
        return linear(x_ZD, self.weights.head)


class InvariantGqaModel(_Invariant, GqaModel):
    """Raises UserInputError for weights on a GPU or not in FP32, EnvironmentFault for uneven products."""

    packed = False

    @one_thread()
    def __init__(self, weights: GqaWeights) -> None:
        _check_embedding(weights.embedding)
        super().__init__(weights, _LevelsGqa(weights))
        layer = weights.layers[0]
        check_matrices([weights.head, *(part.weight for part in (layer.qkv, layer.o, layer.gate_up, layer.down))])

    def _linear(self, x: Tensor, part: Linear) -> Tensor:
        return linear(x, part.weight, part.bias)

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up


class InvariantLatentModel(_Invariant, LatentModel):
    """Raises UserInputError and EnvironmentFault as `InvariantGqaModel` does."""

    @one_thread()
    def __init__(self, weights: InferenceWeights) -> None:
        _check_embedding(weights.embedding)
        super().__init__(weights, _LevelsLatent(weights))
        self.products = _InvariantProducts(self.operations)
        check_matrices([weights.head, *_matrices(weights)])
        check_matrices(_expert_matrices(weights), tile=EXPERT_TILE)
        w, config = weights.layers[0].attention, weights.config
        check_places(partial(super()._absorb, w), (config.num_attention_heads, config.qk_head_dim))
        check_places(partial(super()._unabsorb, w), (config.num_attention_heads, config.kv_lora_rank))

    @one_thread()
    def draft_hidden(self, hidden_MD: Tensor, next_ids_M: Tensor, step: Step, entries_LPSE: Tensor) -> Tensor:
        """A guess may differ in its last bits; what becomes of it is the model's to say."""
        step = with_plan(step, self.dtype)
        return super().draft_hidden(hidden_MD, next_ids_M, step, entries_LPSE)

    def _absorb(self, w: AttentionWeights, q_MHD: Tensor) -> Tensor:
        return by_tiles(partial(super()._absorb, w), q_MHD)

    def _unabsorb(self, w: AttentionWeights, out_MHC: Tensor) -> Tensor:
        return by_tiles(partial(super()._unabsorb, w), out_MHC)


class _LevelsGqa(PlainGqa):
    def decode(self, query_BHA: Tensor, cache_PSE: Tensor, plan: list[Level]) -> Tensor:
        return attend_levels(query_BHA, cache_PSE, plan, self.layout, self.scale)


class _LevelsLatent(PlainOperations):
    def decode(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: list[Level]) -> Tensor:
        return attend_levels(query_BTHE[:, 0], cache_PSE, plan, self.layout, 1.0)[:, None]


class _InvariantProducts(PlainProducts):
    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return linear(x, weight)

    def mlp(self, x: Tensor, weights: MLPWeights) -> Tensor:
        gate, up = self.linear(x, weights.gate_up).chunk(2, dim=-1)
        return self.linear(silu(gate) * up, weights.down)

    def experts(self, x: Tensor, weights: MoEWeights) -> Tensor:
        """Tokens sorted by expert; each expert's rows in tiles of their own, results summed in the router's order."""
        indices_MK, gates_MK = by_tiles(lambda tile: weights.router(tile)[:2], x)
        num_choices = indices_MK.shape[1]
        order = indices_MK.flatten().argsort(stable=True)
        rows = x[order // num_choices]
        out = torch.empty_like(rows)
        begin = 0
        counts = torch.bincount(indices_MK.flatten(), minlength=weights.down_EID.shape[0]).tolist()
        for gate_up_DI, down_ID, count in zip(weights.gate_up_ED2I, weights.down_EID, counts, strict=True):
            if count:
                own = slice(begin, begin + count)
                gate, up = linear(rows[own], gate_up_DI.t(), tile=EXPERT_TILE).chunk(2, dim=-1)
                out[own] = linear(silu(gate) * up, down_ID.t(), tile=EXPERT_TILE)
                begin += count
        out_MKD = torch.empty_like(out).index_copy_(0, order, out).view(*indices_MK.shape, -1)
        total = self.mlp(x, weights.shared)
        for choice in range(num_choices):
            total = total + gates_MK[:, choice, None] * out_MKD[:, choice]
        return total


def _check_embedding(embedding: Tensor) -> None:
    if embedding.device.type != "cpu" or embedding.dtype != torch.float32:
        message = f"is for FP32 on a CPU; the weights are {embedding.dtype} on {embedding.device.type}"
        raise UserInputError(message, where="batch_invariant")


def _matrices(weights: InferenceWeights) -> list[Tensor]:
    found = []
    for layer in weights.layers:
        mlp = layer.mlp if isinstance(layer.mlp, MLPWeights) else layer.mlp.shared
        found += [layer.attention.q_kv_a, layer.attention.q_b, layer.attention.o, mlp.gate_up, mlp.down]
    return [matrix for matrix in found if isinstance(matrix, Tensor)]


def _expert_matrices(weights: InferenceWeights) -> list[Tensor]:
    routed = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, MoEWeights)]
    return [experts[0].t() for mlp in routed for experts in (mlp.gate_up_ED2I, mlp.down_EID)]
