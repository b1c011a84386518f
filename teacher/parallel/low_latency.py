"""Dispatch and combine for decoding: static shapes, no host synchronisation, fit for a CUDA graph.

Each pair of ranks has `capacity` places (`teacher.parallel.mailbox`). A token needs one place a rank at most, so a
capacity of the largest batch never overflows; a smaller one saves memory and, where all places are exchanged, traffic.
Nothing is dropped in silence: a sender that has more rows than places tells every rank so, in the same messages, and
`take_overflow` says after the step that the step must be run again (`teacher.parallel.moe.replayed`).

A dispatch must be followed by its combine before the next dispatch: buffers are used again.

Shape legend: N tokens here, D hidden, K experts per token, R ranks, Q = R * capacity places, B bytes a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.parallel import plan, wire
from teacher.parallel.dispatch import Exchange
from teacher.parallel.groups import Ranks
from teacher.parallel.mailbox import AllToAllMailbox, Mailbox
from teacher.parallel.placement import Placement
from teacher.parallel.plan import NOWHERE

MakeMailbox = Callable[[Ranks, int, int], Mailbox]


class Arrived(NamedTuple):
    """Rows as they came [Q, B]; local slots (int64, -1: none of this rank's, or an empty place); weights FP32.

    `places_NK` says where this rank's own tokens went; -1 for what found no place, too.
    """

    rows_QB: Tensor
    parts: wire.RowLayout
    filled_Q: Tensor
    slots_MK: Tensor
    weights_MK: Tensor
    places_NK: Tensor

    def x(self, dtype: torch.dtype) -> Tensor:
        """The tokens, dequantised [Q, D]; zeros in empty places."""
        return torch.where(self.filled_Q.unsqueeze(1), wire.numbers(self.rows_QB, self.parts, dtype), 0.0)


class LowLatency:
    """The form for up to `max_tokens` a rank of one width; inference alone, no gradients.

    Ranks may have different numbers of tokens, none among them. `make_mailbox` (ranks, capacity, bytes a row) makes the
    two mailboxes. Raises ValueError for a capacity below 1, and for widths that the wire's form does not take.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        hidden: int,
        per_token: int,
        max_tokens: int,
        capacity: int | None = None,
        make_mailbox: MakeMailbox = AllToAllMailbox,
    ) -> None:
        self.capacity = max_tokens if capacity is None else capacity
        if self.capacity < 1:
            raise ValueError(f"a pair of ranks needs a place at least, got a capacity of {self.capacity}")
        self.ranks, self.max_tokens = exchange.ranks, max_tokens
        self._parts = wire.layout(hidden, per_token, exchange.wire.out)
        self._back = wire.layout(hidden, 0, exchange.wire.back)
        self._place(exchange.placement)
        self._out = make_mailbox(self.ranks, self.capacity, self._parts.row_bytes)
        self._returned = make_mailbox(self.ranks, self.capacity, self._back.scales)
        places_Q = torch.arange(self.ranks.num_ranks * self.capacity, device=self.ranks.device)
        self._places_Q, self._first_R = places_Q, places_Q[:: self.capacity]
        self._ranks_R = torch.arange(self.ranks.num_ranks, device=self.ranks.device)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=self.ranks.device)

    def _place(self, placement: Placement) -> None:
        self.placement = placement
        self._tables = placement.tables(self.ranks.device)
        self._rank_of_slot_S1 = plan.direct(placement).to(self.ranks.device)

    def placed(self, exchange: Exchange) -> LowLatency:
        """The same, buffers too, for the placement of `exchange`: layers placed differently take turns with them."""
        other = copy.copy(self)
        other._place(exchange.placement)
        return other

    def take_overflow(self) -> bool:
        """Tell whether any dispatch since the last call overflowed on any rank, alike on every rank. The host waits."""
        overflowed = bool(self.overflowed.item())
        self.overflowed.zero_()
        return overflowed

    def dispatch(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Arrived:
        """Raises ValueError for more than `max_tokens` tokens."""
        places_NK = self.send(x_ND, indices_NK, weights_NK)
        self._out.deliver()
        return self.received(places_NK)

    def combine(self, out_QD: Tensor, arrived: Arrived) -> Tensor:
        """The sum of the ranks' shares of each token, FP32 [N, D]. Zeros where a token found no place anywhere."""
        self.send_back(out_QD, arrived)
        self._returned.deliver()
        return self.summed(arrived.places_NK)

    # The halves on either side of a delivery, so that a test can run many ranks in one process.

    def send(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Put every token where it must go; returns the places [N, K]."""
        if x_ND.shape[0] > self.max_tokens:
            raise ValueError(f"{x_ND.shape[0]} tokens, at most {self.max_tokens} fit")
        slots_NK = self._tables.choose(indices_NK, rank=self.ranks.rank)
        copies = plan.find_copies(slots_NK, self._rank_of_slot_S1, self.ranks.num_ranks)
        places_NK = self._within_capacity(slots_NK, copies)
        rows_NB = wire.pack(x_ND, slots_NK, weights_NK, self._parts)
        per_token = slots_NK.shape[1]
        tokens_P = torch.arange(places_NK.numel(), device=x_ND.device) // per_token
        self._out.put(rows_NB[:, : self._parts.weights].contiguous(), tokens_P, places_NK.flatten())
        flag_R = (copies.counts_R > self.capacity).any().expand(self.ranks.num_ranks)
        tails = torch.stack((copies.counts_R, flag_R), dim=1).to(torch.int32).view(torch.uint8)
        self._out.put(tails, self._ranks_R, self._first_R, offset=self._parts.weights)
        return places_NK

    def _within_capacity(self, slots_NK: Tensor, copies: plan.Copies) -> Tensor:
        rank_NK = plan.destinations(slots_NK, self._rank_of_slot_S1)
        start_R = copies.counts_R.cumsum(0) - copies.counts_R
        nth_NK = copies.places_NK - start_R[rank_NK]
        fits_NK = (copies.places_NK != NOWHERE) & (nth_NK < self.capacity)
        return torch.where(fits_NK, rank_NK * self.capacity + nth_NK, NOWHERE)

    def received(self, places_NK: Tensor) -> Arrived:
        rows_QB = self._out.inbox_QB
        tails = wire.tail(rows_QB, self._parts).view(self.ranks.num_ranks, self.capacity, 2)[:, 0]
        self.overflowed |= tails[:, 1].any()
        filled_Q = self._places_Q % self.capacity < tails[:, 0].repeat_interleave(
            self.capacity, output_size=self._places_Q.numel()
        )
        slots_MK, weights_MK = wire.addresses(rows_QB, self._parts)
        local_MK = plan.local_slots(slots_MK.long(), self.placement.slots_per_rank, self.ranks.rank)
        local_MK = torch.where(filled_Q.unsqueeze(1), local_MK, NOWHERE)
        return Arrived(rows_QB, self._parts, filled_Q, local_MK, weights_MK, places_NK)

    def send_back(self, out_QD: Tensor, arrived: Arrived) -> None:
        rows = wire.pack_numbers(out_QD, self._back)
        self._returned.put(rows, self._places_Q, torch.where(arrived.filled_Q, self._places_Q, NOWHERE))

    def summed(self, places_NK: Tensor) -> Tensor:
        returned_QD = self._returned.inbox_QB.view(wire.DTYPES[self._back.form])
        return plan.summed(returned_QD, places_NK)
