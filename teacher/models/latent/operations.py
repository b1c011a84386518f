"""The seam between the engine and how its parts are computed: plain torch operations on a CPU, kernels on a GPU.

The runner knows what a step is; an `Operations` knows one device's way to write latents, to attend and to route. Both
read and write the cache as the block manager laid it out, and agree up to rounding.

Shape legend: M rows, B decoding sequences, T queries of a chunk or sequence, U its context, H heads, C latent, R rope,
E = C + R, D query and key width, V value width, P pages, S places a page, K experts a token, X hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.models.latent.weights import AttentionWeights, MoEWeights


class Operations(Protocol):
    graphable: bool  # nothing of a step of decoding sequences waits for the device, or depends on its numbers
    extent: int  # pages of one sequence that lie together, where the block manager can have it so

    def plan(self, decodes: Decodes) -> Any:
        """Make what `decode` needs besides, once a step for all layers."""
        ...

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> Any:
        """Make the same from int32 tensors on the device, which stay there; zero lengths are padding."""
        ...

    def rotate(self, query_MHD: Tensor, step: Step) -> None:
        """Rotate the last R of D dimensions in place."""
        ...

    def write(self, projected_ME: Tensor, weights: AttentionWeights, step: Step, cache_PSE: Tensor) -> None:
        """Norm latents, rotate rope keys and put both where the step says."""
        ...

    def decode(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: Any) -> Tensor:
        """Absorbed attention of last tokens, [B, T, H, C]. Queries hold the softmax scale, here and below."""
        ...

    def absorbed(self, query_THE: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        """Absorbed attention of a chunk over its context, [T, H, C]."""
        ...

    def expanded(self, query_THD: Tensor, key_UHD: Tensor, value_UHV: Tensor) -> Tensor:
        """Causal attention of the last T of U tokens, [T, H, V]."""
        ...

    def route(self, x_MX: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Experts int [M, K], their gates [M, K], and the end of each expert's rows once sorted by it, int32."""
        ...
