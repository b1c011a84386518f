"""`FixedPlaces` over NVLink: kernels quantise each token once and store it straight into the memory of its ranks.

    1 dispatch   quantise a token (or take it quantised), store numbers and header to each of its ranks
      barrier    everybody's stores are there
    2 receive    headers to local slots, weights, loads and scales by column, which the experts take
                 (the experts)
    3 return     each row to the rank it came from
      barrier
    4 sum        a token's rows, in the order of the ranks

The same bytes and sums as the twin over exchanges. A barrier waits for all ranks and releases all: what they stored
before it is there after it. It says as much of what they read: who arrives at the barrier of the way back has read what
came on the way out, and the other way round. So an inbox is written again only when its reader is done with it, and
needs no second buffer.

Shape legend: as `teacher.parallel.exchange.fixed_places`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teacher.kernels.quantise.reference import Quantised
from teacher.parallel.exchange.fixed_places import ExpertInputs, FixedPlaces
from teacher.parallel.exchange.symmetric_mailbox import SymmetricMailbox
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import SlotTables


class SymmetricFixedPlaces(FixedPlaces):
    """`FixedPlaces` on GPUs that reach each other's memory.

    At most `max_programs` programs of 256 threads store to peers at a time, which leaves the other multiprocessors to
    what runs beside; None: one a token. Raises EnvironmentFault where the ranks cannot share memory.
    """

    def __init__(
        self, ranks: Ranks, *, max_programs: int | None = None, make_mailbox: Any = SymmetricMailbox, **sizes: Any
    ) -> None:
        super().__init__(ranks, make_mailbox=make_mailbox, **sizes)
        self.max_programs = max_programs

    def deliver_out(self) -> None:
        # One barrier for all stores, the values' too: it orders everything that the stream did before it.
        self._headers.deliver()

    def send(self, x: Tensor | Quantised, indices_NK: Tensor, weights_NK: Tensor, tables: SlotTables) -> Tensor:
        from teacher.parallel.exchange import symmetric_places_triton as kernels

        # Phase 1; `deliver_out` ends it: after its barrier every rank's stores are in every inbox.
        return kernels.dispatch_kernel(
            x, indices_NK.contiguous(), weights_NK.float().contiguous(), tables, self._addresses(), self._header,
            values=self._values, headers=self._headers, max_programs=self.max_programs,
        )  # fmt: skip

    def received(self, ranks_N: Tensor) -> ExpertInputs:
        from teacher.parallel.exchange import symmetric_places_triton as kernels

        choice, scales = kernels.receive_kernel(self._headers.inbox_QB, self._header, self._addresses())
        return ExpertInputs(Quantised(self._values.inbox_QB.view(torch.float8_e4m3fn), scales), choice, ranks_N)

    def send_back(self, out_QD: Tensor, received: ExpertInputs) -> None:
        from teacher.parallel.exchange import symmetric_places_triton as kernels

        kernels.return_kernel(
            out_QD.contiguous(), received.choice.indices_NK, self._addresses(), self._returned, self.max_programs
        )

    def summed(self, ranks_N: Tensor) -> Tensor:
        from teacher.parallel.exchange import symmetric_places_triton as kernels

        return kernels.sum_kernel(self._returned.inbox_QB.view(torch.bfloat16), ranks_N, self._addresses())

    def _addresses(self) -> Any:
        from teacher.parallel.exchange.symmetric_places_triton import Addresses

        return Addresses(self.ranks.rank, self.ranks.num_ranks, self.max_tokens, self.slots_per_rank)
