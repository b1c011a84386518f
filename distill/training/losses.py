"""The loss of next-token training, and of training on tokens further ahead.

Shape legend: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that `cross_entropy` leaves out


def labels(ids_BT: Tensor, is_target_BT: Tensor) -> Tensor:
    """Token ids where they are to be predicted, IGNORED elsewhere."""
    return ids_BT.masked_fill(~is_target_BT, IGNORED)


def cross_entropy(
    logits_BTV: Tensor, labels_BT: Tensor, *, ahead: int, ignored: int = IGNORED, reduction: str = "mean"
) -> Tensor:
    """FP32 loss of predicting token i + `ahead` at position i, over positions where that is not `ignored`."""
    return F.cross_entropy(
        logits_BTV[:, :-ahead].flatten(0, 1).float(),
        labels_BT[:, ahead:].flatten(),
        ignore_index=ignored,
        reduction=reduction,
    )
