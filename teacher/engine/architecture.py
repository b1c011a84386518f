"""Architecture: what the engine asks of a model, namely the shape of its cache and one forward pass over a step.

Shape legend: M rows of a step, B sequences that decode, Q pages of each, Z rows whose logits are wanted, D hidden,
L layers, P pages, S places a page, E numbers
that a layer's cache keeps of a token.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from teacher.engine.cache import CacheShape
from teacher.engine.step import Decodes, Step


class Architecture(Protocol):
    @property
    def precision(self) -> str:
        """Precision of the products: float32, bfloat16 or fp8."""
        ...

    device: torch.device
    dtype: torch.dtype  # of activations and of the cache
    max_positions: int
    cache_shape: CacheShape
    graphable: bool  # a step in which all sequences decode can be a CUDA graph
    reads_in_graphs: bool  # it may have any number of queries a sequence there: a prompt is such a step too
    reads_together: bool  # `hidden` takes a step's `packed` prompts, which may be a CUDA graph
    extent: int  # pages of one sequence that lie together, where the block manager can have it so

    def plan(self, decodes: Decodes) -> Any:
        """Plan what attention needs of a step's decoding sequences, made once for all layers."""
        ...

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> Any:
        """The same from int32 tensors, without a look at their numbers: a CUDA graph holds for any of them.

        A length of zero is a row of padding. Only what is `graphable` needs it.
        """
        ...

    def hidden(self, step: Step, entries_LPSE: Tensor) -> Tensor:
        """Put the step's tokens into the cache and return their last hidden states, [M, D], behind the last norm."""
        ...

    def logits(self, x_ZD: Tensor) -> Tensor:
        """FP32 [Z, vocabulary]."""
        ...


@runtime_checkable
class DraftingArchitecture(Architecture, Protocol):
    """An architecture that can also guess the token after the next one."""

    num_draft_layers: int  # of the cache, behind the model's own; 0: the weights for it are not there

    def draft_hidden(self, hidden_MD: Tensor, next_ids_M: Tensor, step: Step, entries_LPSE: Tensor) -> Tensor:
        """Compute from `hidden` and the token after each row states whose `logits` guess the one after that, [M, D].

        `entries` are the draft layers' alone; the step's tokens are put there too.
        """
        ...
