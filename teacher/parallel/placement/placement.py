"""Experts and the ranks that hold them: a table of slots, in which an expert may occur more than once (redundant).

DeepSeek-V3 (arXiv 2412.19437 s.3.4.1) deploys hot experts several times, so that ranks are loaded evenly. All ranks
have the same number of slots; slot s lies on rank `s // slots_per_rank`; ranks of a node are neighbours.

Shape legend: E experts, S slots in all, N tokens, K experts per token, C = S - E + 1 copies that an expert may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.errors import DataError


@dataclass(frozen=True)
class Placement:
    """`experts_S[s]` is the expert in slot s. Raises DataError where slots, ranks and nodes do not divide.

    >>> Placement.contiguous(num_experts=4, num_ranks=2).experts_S
    (0, 1, 2, 3)
    """

    experts_S: tuple[int, ...]
    num_experts: int
    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise DataError(
                f"{self.num_ranks} ranks are no whole number of nodes with {self.ranks_per_node} ranks each"
            )
        if not self.experts_S or len(self.experts_S) % self.num_ranks:
            raise DataError(f"{len(self.experts_S)} slots do not divide among {self.num_ranks} ranks")
        missing = set(range(self.num_experts)) - set(self.experts_S)
        if missing:
            raise DataError(f"no slot holds expert {min(missing)}", field="experts_S")
        if unknown := set(self.experts_S) - set(range(self.num_experts)):
            raise DataError(f"expert {max(unknown)} of {self.num_experts} does not exist", field="experts_S")

    @classmethod
    def contiguous(
        cls, *, num_experts: int, num_ranks: int, num_redundant: int = 0, ranks_per_node: int | None = None
    ) -> Placement:
        """Experts in order: each rank's share, and behind it the first of the next rank's as its part of the
        redundant ones; one node unless told otherwise.

        Nobody knows loads yet: under even ones all ranks are loaded alike where shares and redundant experts divide.
        Raises DataError where their sum does not divide among the ranks.

        >>> Placement.contiguous(num_experts=4, num_ranks=2, num_redundant=2).experts_S
        (0, 1, 2, 2, 3, 0)
        """
        num_slots = num_experts + num_redundant
        if num_redundant < 0 or num_ranks < 1 or num_slots % num_ranks:
            message = f"{num_experts} experts and {num_redundant} redundant ones do not divide among {num_ranks} ranks"
            raise DataError(message, field="num_redundant")
        per_rank = range(num_slots // num_ranks)
        slots = (rank * num_experts // num_ranks + n for rank in range(num_ranks) for n in per_rank)
        return cls(tuple(slot % num_experts for slot in slots), num_experts, num_ranks, ranks_per_node or num_ranks)

    @property
    def num_slots(self) -> int:
        return len(self.experts_S)

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def has_replicas(self) -> bool:
        return self.num_slots > self.num_experts

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Experts in the slots of `rank`."""
        return self.experts_S[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    @cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each expert, ascending."""
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.experts_S):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    def tables(self, device: torch.device | str = "cpu") -> SlotTables:
        """The same on a device, for `SlotTables.choose`; as wide for every placement of as many slots."""
        most = self.num_slots - self.num_experts + 1
        padded = [slots + (0,) * (most - len(slots)) for slots in self.slots_of_expert]
        counts = [len(slots) for slots in self.slots_of_expert]
        return SlotTables(torch.tensor(padded, device=device), torch.tensor(counts, device=device))


@dataclass(frozen=True)
class SlotTables:
    """int64: the slots of each expert [E, C], and how many of them count [E]."""

    slots_EC: Tensor
    num_copies_E: Tensor

    def choose(self, indices_NK: Tensor, *, rank: int) -> Tensor:
        """The slot that serves each choice, int64 [N, K]. Static shapes, no host synchronisation.

        Copies of an expert take turns by token, each rank beginning elsewhere, so that they share its load evenly
        whatever the tokens are: the loads that a placement was packed for are those that ranks then get.
        """
        indices_NK = indices_NK.long()
        turn_N1 = torch.arange(indices_NK.shape[0], device=indices_NK.device).unsqueeze(1) + rank
        return self.slots_EC[indices_NK, turn_N1 % self.num_copies_E[indices_NK]]

    def become(self, placement: Placement) -> None:
        """Those of another placement of as many experts and slots, in place: CUDA graphs that read them stay valid.

        On a GPU in the order of the current stream; the host does not wait.
        """
        new = placement.tables()
        for table, of_new in ((self.slots_EC, new.slots_EC), (self.num_copies_E, new.num_copies_E)):
            table.copy_(of_new.pin_memory() if table.is_cuda else of_new, non_blocking=True)
