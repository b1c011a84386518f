"""Mailboxes of ranks that live in one process: stores by address reach every rank's memory, as over NVLink."""

from __future__ import annotations

from typing import Any

import torch

from teacher.parallel.groups import Ranks


class Shared:
    """The inboxes of ranks that live in one process, by the order in which a rank makes them. Poisoned at first."""

    def __init__(self, num_ranks: int, device: str) -> None:
        self.num_ranks, self.device = num_ranks, device
        self.inboxes: dict[tuple[int, int], list[torch.Tensor]] = {}

    def __call__(self, ranks: Ranks, capacity: int, row_bytes: int) -> Any:
        shape = (self.num_ranks * capacity, row_bytes)
        if shape not in self.inboxes:
            poison = [torch.full(shape, 0xFF, dtype=torch.uint8, device=self.device) for _ in range(self.num_ranks)]
            self.inboxes[shape] = poison
        return Mailbox(ranks, capacity, self.inboxes[shape])


class Mailbox:
    def __init__(self, ranks: Ranks, capacity: int, inboxes: list[torch.Tensor]) -> None:
        self.rank, self.capacity, self.inboxes = ranks.rank, capacity, inboxes
        self.inbox_QB = inboxes[ranks.rank]
        distances = [inbox.data_ptr() - self.inbox_QB.data_ptr() for inbox in inboxes]
        self.distances_R = torch.tensor(distances, device=self.inbox_QB.device)

    def put(self, rows_NB, sources_P, places_P, *, offset=0) -> None:
        for source, place in zip(sources_P.tolist(), places_P.tolist(), strict=True):
            if place >= 0:
                to = self.inboxes[place // self.capacity][self.rank * self.capacity + place % self.capacity]
                to[offset : offset + rows_NB.shape[1]] = rows_NB[source]
