"""Qwen2, Qwen3 and Llama 3 over a step: grouped-query attention on a paged cache of keys and values, SwiGLU.

All rows share the projections. The families differ in biases, in norms of the heads and in how rotations are stretched,
all of which the weights say (`grouped_config`).

Shape legend: M tokens (rows), D hidden, H heads, A width of a head, X queries, keys and values of all heads, Z sampled
rows, L layers, P pages, S places a page, E = 2 * key-value heads * A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.engine.cache import CacheShape
from teacher.engine.step import Decodes, Step
from teacher.kernels.pointwise.pointwise import add_rms_norm, swiglu
from teacher.models.arithmetic import fp32_product, linear
from teacher.models.gqa.operations import GqaOperations, gqa_operations_for
from teacher.models.gqa.weights import GqaLayer, GqaWeights, Linear, load_gqa


class GqaModel:
    """A `teacher.engine.architecture.Architecture`."""

    packed = True  # its matrices, on a CPU

    def __init__(self, weights: GqaWeights, operations: GqaOperations | None = None) -> None:
        self.weights = weights
        self.config = config = weights.config
        self.operations = operations or gqa_operations_for(weights)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.max_positions = config.max_position_embeddings
        self.cache_shape = CacheShape(config.num_hidden_layers, 2 * config.num_key_value_heads * config.head_dim)
        self.extent, self.graphable = self.operations.extent, self.operations.graphable
        self.reads_in_graphs = False  # its decoding kernel takes one query of a sequence
        self.reads_together = self.graphable

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> GqaModel:
        """A checkpoint folder; without `dtype` in FP32 on a CPU, in BF16 on a GPU."""
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return cls(load_gqa(folder, device, dtype, packed=cls.packed))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def plan(self, decodes: Decodes) -> Any:
        return self.operations.plan(decodes)

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> Any:
        assert num_queries == 1, "nothing drafts for this architecture"
        return self.operations.plan_on_device(pages_BQ, lengths_B)

    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        x_MD = self.weights.embedding[step.token_ids_M]
        normed_MD = self._norm(x_MD, self.weights.layers[0].attention_norm)
        # What a branch gives is added by the norm behind it.
        behind = [*(layer.attention_norm for layer in self.weights.layers[1:]), self.weights.norm]
        for layer, cache_PSE, norm_D in zip(self.weights.layers, entries_LPSE, behind, strict=True):
            branch_MD = self._attention(layer, normed_MD, step, cache_PSE)
            x_MD, normed_MD = self._add_norm(x_MD, branch_MD, layer.mlp_norm)
            x_MD, normed_MD = self._add_norm(x_MD, self._mlp(layer, normed_MD), norm_D)
        return normed_MD

    def logits(self, x_ZD: Tensor) -> Tensor:
        return fp32_product(x_ZD, self.weights.head)

    def _attention(self, layer: GqaLayer, x_MD: Tensor, step: Step, cache_PSE: Tensor) -> Tensor:
        query_MHA = self.operations.place(self._linear(x_MD, layer.qkv), layer, step, cache_PSE)
        if step.packed is not None:
            out_MHA = self.operations.read_together(query_MHA, cache_PSE, step.packed)
            return self._linear(out_MHA.flatten(1), layer.o)
        outs: list[Tensor] = []
        row = 0
        for decodes in step.decodes:
            outs.append(self.operations.decode(query_MHA[row : row + decodes.num_rows], cache_PSE, decodes.plan))
            row += decodes.num_rows
        for chunk in step.chunks:
            outs.append(self.operations.read(query_MHA[chunk.start : chunk.end], cache_PSE, chunk))
        out_MHA = torch.cat(outs) if len(outs) > 1 else outs[0]
        return self._linear(out_MHA.flatten(1), layer.o)

    def _mlp(self, layer: GqaLayer, x_MD: Tensor) -> Tensor:
        return self._linear(self._swiglu(self._linear(x_MD, layer.gate_up)), layer.down)

    def _norm(self, x_MD: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_MD, (x_MD.shape[-1],), weight, self.config.rms_norm_eps)

    def _add_norm(self, x_MD: Tensor, branch_MD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x_MD, branch_MD, weight, self.config.rms_norm_eps)

    def _linear(self, x: Tensor, part: Linear) -> Tensor:
        return linear(x, part.weight, part.bias)

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)
