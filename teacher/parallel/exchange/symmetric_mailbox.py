"""A mailbox in memory that peers store to: NVLink instead of messages.

`torch.distributed._symmetric_memory` maps every rank's buffers into every other's address space, on GPUs of one NVLink
domain. Plain loads and stores to those addresses do it all; NVLink multicast is never used.

Shape legend: R ranks, Q = R * capacity places, B bytes a row.
"""

from __future__ import annotations

import warnings

import torch

from distill.errors import EnvironmentFault
from teacher.parallel.groups import Ranks


class SymmetricMailbox:
    """Memory that peers store to. `distances_R`: bytes from this inbox to each rank's, int64, on the device."""

    def __init__(self, ranks: Ranks, capacity: int, row_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        num_places = ranks.num_ranks * capacity
        try:
            self.inbox_QB = symmetric_memory.empty(
                num_places, row_bytes, dtype=torch.uint8, device=ranks.device
            ).zero_()
            with warnings.catch_warnings():  # torch 2.11 may want it; later ones deprecate it
                warnings.simplefilter("ignore", FutureWarning)
                symmetric_memory.enable_symm_mem_for_group(ranks.world.group_name)
            self._handle = symmetric_memory.rendezvous(self.inbox_QB, ranks.world)
        except RuntimeError as exc:
            message = f"these {ranks.num_ranks} ranks cannot share memory: {str(exc).splitlines()[0]}"
            raise EnvironmentFault(message, where=str(ranks.device)) from exc
        # Where every rank's inbox is mapped in this rank's address space.
        starts = [self._handle.get_buffer(rank, (1,), torch.uint8).data_ptr() for rank in range(ranks.num_ranks)]
        # Inboxes begin at the same place of their allocations on every rank, so that these lie as far apart as those.
        distances = [start - starts[ranks.rank] for start in starts]
        self.distances_R = torch.tensor(distances, dtype=torch.int64, device=ranks.device)
        self.deliver()  # nobody stores into an inbox that is still being zeroed

    def deliver(self) -> None:
        """A barrier of kernels: what peers stored before it is there after it. The host does not wait."""
        self._handle.barrier()
