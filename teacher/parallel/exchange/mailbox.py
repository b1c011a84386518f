"""Fixed places for rows between ranks: no counts, no host synchronisation.

Every rank has `capacity` places for rows of every other. `put` writes rows to places, `deliver` makes sure that all
that was put is there, everywhere. Place p, as a sender says it, is place `p % capacity` of those that rank
`p // capacity` keeps for the sender; in the inbox it is row `sender * capacity + p % capacity`.

`AllToAllMailbox` works over any backend: rows go to an outbox, and one exchange of equal parts moves all of it, filled
or not.

Shape legend: R ranks, Q = R * capacity places, P rows put, B bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from teacher.parallel.groups import Ranks, exchange_evenly


class Mailbox(Protocol):
    """`inbox_QB` is uint8; what lies where nobody put anything is what lay there before."""

    inbox_QB: Tensor

    def put(self, rows_NB: Tensor, sources_P: Tensor, places_P: Tensor, *, offset: int = 0) -> None:
        """Copy row `sources_P[i]` to place `places_P[i]` (-1: nowhere), from byte `offset` of the place on.

        Rows of uint8, at most as wide as a place, in whole words of 4 bytes.
        """

    def deliver(self) -> None:
        """After it, `inbox_QB` holds what all ranks put. Collective."""


MakeMailbox = Callable[[Ranks, int, int], Mailbox]  # (ranks, capacity, bytes a row)


class AllToAllMailbox:
    """Over any backend: `put` fills an outbox, `deliver` exchanges all of it, empty places too."""

    def __init__(self, ranks: Ranks, capacity: int, row_bytes: int) -> None:
        self._ranks = ranks
        self._num_places = ranks.num_ranks * capacity
        # One row more, for what goes nowhere: a place that depends on the data may not change a shape.
        self._outbox = torch.zeros(self._num_places + 1, row_bytes, dtype=torch.uint8, device=ranks.device)
        self.inbox_QB = torch.zeros(self._num_places, row_bytes, dtype=torch.uint8, device=ranks.device)

    def put(self, rows_NB: Tensor, sources_P: Tensor, places_P: Tensor, *, offset: int = 0) -> None:
        targets_P = torch.where(places_P >= 0, places_P, self._num_places)
        words = rows_NB.view(torch.int32).index_select(0, sources_P)
        columns = self._outbox.view(torch.int32)[:, offset // 4 : offset // 4 + words.shape[1]]
        columns.index_copy_(0, targets_P, words)

    def deliver(self) -> None:
        exchange_evenly(self.inbox_QB, self._outbox[: self._num_places], self._ranks.world)
