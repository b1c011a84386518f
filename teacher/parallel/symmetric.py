"""The low-latency form over NVLink: kernels write each row straight into the memory of the rank it is for.

`torch.distributed._symmetric_memory` maps every rank's buffers into every other's address space, on GPUs of one NVLink
domain. Plain loads and stores to those addresses do it all; NVLink multicast is never used. Seven launches a layer:

    plan      copies and their order, block by block of tokens
    dispatch  quantise a token and store it to its peers, a program a token; how many come
    barrier   everybody's stores are there
    receive   this rank's slots and weights of what came
              (the experts)
    return    each row to the rank it came from
    barrier
    sum       a token's rows, in the order of its choices

The same places, bytes and order of sums as `LowLatency` over an exchange, which is its twin. An inbox is written again
only after the other inbox's barrier, at which its readers are done: no second buffer is needed.

Shape legend: as `teacher.parallel.low_latency`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from distill.errors import EnvironmentFault
from teacher.parallel import wire
from teacher.parallel.dispatch import Exchange
from teacher.parallel.groups import Ranks
from teacher.parallel.low_latency import Arrived, LowLatency


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


class SymmetricLowLatency(LowLatency):
    """`LowLatency` on GPUs that reach each other's memory; for few tokens and for many. Tokens BF16 and contiguous.

    Raises EnvironmentFault where the ranks cannot share memory, ValueError for an FP32 wire.
    """

    def __init__(self, exchange: Exchange, *, make_mailbox: Any = SymmetricMailbox, **sizes: Any) -> None:
        super().__init__(exchange, make_mailbox=make_mailbox, **sizes)
        if exchange.wire.out == "fp32" or exchange.wire.back != "bf16":
            raise ValueError(f"the wire must be FP8 or BF16, and BF16 back, got {exchange.wire}")

    def send(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        from teacher.parallel import symmetric_triton as kernels

        if x_ND.shape[0] > self.max_tokens:
            raise ValueError(f"{x_ND.shape[0]} tokens, at most {self.max_tokens} fit")
        lot = kernels.Lot(
            self._parts, self.capacity, self.ranks.rank, self.ranks.num_ranks, self._out.inbox_QB, self._out.distances_R
        )
        slots_per_rank = self.placement.slots_per_rank
        planned = kernels.plan_kernel(indices_NK, self._tables, slots_per_rank, lot.rank, lot.num_ranks)
        x_ND = x_ND.to(torch.bfloat16).contiguous()
        return kernels.dispatch_kernel(x_ND, weights_NK, planned, slots_per_rank, lot)

    def received(self, places_NK: Tensor) -> Arrived:
        from teacher.parallel import symmetric_triton as kernels

        rows_QB = self._out.inbox_QB
        filled_Q, slots_MK, weights_MK = kernels.receive_kernel(
            rows_QB, self._parts, self.capacity, self.ranks.rank * self.placement.slots_per_rank,
            self.placement.slots_per_rank, self.overflowed,
        )  # fmt: skip
        return Arrived(rows_QB, self._parts, filled_Q, slots_MK, weights_MK, places_NK)

    def send_back(self, out_QD: Tensor, arrived: Arrived) -> None:
        from teacher.parallel import symmetric_triton as kernels

        lot = kernels.Lot(
            self._back,
            self.capacity,
            self.ranks.rank,
            self.ranks.num_ranks,
            self._returned.inbox_QB,
            self._returned.distances_R,
        )
        kernels.return_kernel(out_QD.contiguous(), arrived.rows_QB, self._parts, lot)

    def summed(self, places_NK: Tensor) -> Tensor:
        from teacher.parallel import symmetric_triton as kernels

        return kernels.sum_kernel(self._returned.inbox_QB.view(wire.DTYPES[self._back.form]), places_NK)
