"""Token ids that are not known yet: a step that runs ahead reads them from the device (`run_ahead`).

A placeholder is a negative id, -1 minus the row of the token among those that the step under way samples. It stands at
the end of a sequence's `generated_ids` until the token arrives, and reaches the device like any other id. There the
next step's first operation replaces it by the token itself, so the host need not know it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def placeholder(row: int) -> int:
    """Stand for the token that the step under way samples as its `row`th."""
    return -1 - row


def resolve_placeholders(token_ids_M: Tensor, before_Z: Tensor) -> Tensor:
    """Replace each placeholder by its token among `before`, those that the step before has sampled."""
    return torch.where(token_ids_M < 0, before_Z[(-1 - token_ids_M).clamp(min=0)], token_ids_M)
