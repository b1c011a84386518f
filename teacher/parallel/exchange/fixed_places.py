"""Dispatch and combine for many tokens, inference alone: every token has its place, and nothing is planned.

Token n of rank s lies at place `s * max_tokens + n` of every rank that it goes to. So no rank counts anything before it
sends, no shape depends on the routing, the host never waits (a CUDA graph may hold it all), and nothing can overflow.
The price is memory, not traffic: places for all tokens of all ranks.

A rank has three inboxes. `values`: E4M3 numbers, row by row without anything between, as the FP8 experts read them.
`headers`: scales, slots and weights; every token's goes to every rank, so that an empty place says so. `returned`: the
rows that come back, BF16, each rank's share of a token's weighted sum; the origin adds them in the order of the ranks.
Where experts lie is each dispatch's to say, so that layers which are placed differently take turns with the inboxes.

`FixedPlaces` works over any backend by exchanges of equal parts, which move empty places too; it is the twin of
`teacher.parallel.exchange.symmetric_places`, which stores straight to the peers. A dispatch must be followed by its
combine before the next dispatch: inboxes are used again.

Shape legend: N tokens here, D hidden, K experts per token, R ranks, Q = R * max_tokens places, G = D / 128, S own
slots, B bytes a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teacher.kernels.moe.experts import default_tiling, routed_experts_fp8
from teacher.kernels.moe.reference import ExpertWeights
from teacher.kernels.moe.route_reference import Choice
from teacher.kernels.quantise.quantise import quantise
from teacher.kernels.quantise.reference import Quantised, empty_scales
from teacher.parallel.exchange import wire
from teacher.parallel.exchange.copies import NOWHERE, local_slots
from teacher.parallel.exchange.mailbox import AllToAllMailbox, MakeMailbox
from teacher.parallel.groups import Ranks
from teacher.parallel.placement.placement import SlotTables

MOST_RANKS = 31  # bits of an int32 that is not negative


class ExpertInputs(NamedTuple):
    """Tokens that arrived, for `teacher.kernels.moe.experts.routed_experts_fp8` as they are.

    `x`: E4M3 [Q, D] (the inbox itself) and FP32 [Q, G]; whatever lay there before where nothing came. `choice`: local
    slots int32 [Q, K], -1 for those of other ranks and in empty places; weights [Q, K], zero there; loads [S].
    `ranks_N`: bit r says that this rank's own token went to rank r.
    """

    x: Quantised
    choice: Choice
    ranks_N: Tensor


class FixedPlaces:
    """The form for up to `max_tokens` a rank of one width. Ranks may have different numbers of tokens, or none.

    Raises ValueError for more than 31 ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        slots_per_rank: int,
        hidden: int,
        per_token: int,
        max_tokens: int,
        make_mailbox: MakeMailbox = AllToAllMailbox,
    ) -> None:
        if ranks.num_ranks > MOST_RANKS:
            raise ValueError(f"at most {MOST_RANKS} ranks, got {ranks.num_ranks}")
        self.ranks, self.slots_per_rank, self.max_tokens = ranks, slots_per_rank, max_tokens
        self.hidden, self.per_token = hidden, per_token
        row = wire.layout(hidden, per_token, "fp8")
        # The row of the other forms, cut where its numbers end.
        self._header = row._replace(
            numbers=0,
            scales=row.scales - row.numbers,
            slots=row.slots - row.numbers,
            weights=row.weights - row.numbers,
            row_bytes=row.row_bytes - row.numbers,
        )
        self._values = make_mailbox(self.ranks, max_tokens, row.numbers)
        self._headers = make_mailbox(self.ranks, max_tokens, self._header.row_bytes)
        self._returned = make_mailbox(self.ranks, max_tokens, 2 * hidden)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a token on the way out, and on the way back."""
        return self.hidden + self._header.row_bytes, 2 * self.hidden

    def dispatch(
        self, x: Tensor | Quantised, indices_NK: Tensor, weights_NK: Tensor, tables: SlotTables
    ) -> ExpertInputs:
        """Tokens [N, D] to the ranks of their experts by `tables`, which are alike on all ranks.

        Raises ValueError for more than `max_tokens` tokens.
        """
        if len(indices_NK) > self.max_tokens:
            raise ValueError(f"{len(indices_NK)} tokens, at most {self.max_tokens} fit")
        ranks_N = self.send(x, indices_NK, weights_NK, tables)
        self.deliver_out()
        return self.received(ranks_N)

    def combine(self, out_QD: Tensor, received: ExpertInputs) -> Tensor:
        """The sum of the ranks' shares of each token, FP32 sums in the order of the ranks, BF16 [N, D]."""
        self.send_back(out_QD, received)
        self._returned.deliver()
        return self.summed(received.ranks_N)

    # The halves on either side of a delivery, so that a test can run many ranks in one process.

    def deliver_out(self) -> None:
        """Wait until what all ranks have put is in every inbox."""
        self._values.deliver()
        self._headers.deliver()

    def send(self, x: Tensor | Quantised, indices_NK: Tensor, weights_NK: Tensor, tables: SlotTables) -> Tensor:
        """Put every token where it must go; returns `ExpertInputs.ranks_N`."""
        values_ND, scale_inv_NG = x if isinstance(x, Quantised) else quantise(x)
        # Which ranks each token goes to: once a rank, however many of its experts live there.
        slots_NK = tables.choose(indices_NK, rank=self.ranks.rank)
        num_tokens, num_ranks, device = len(slots_NK), self.ranks.num_ranks, self.ranks.device
        ranks_R = torch.arange(num_ranks, device=device)
        goes_NR = (slots_NK.unsqueeze(1) // self.slots_per_rank == ranks_R.view(1, -1, 1)).any(dim=2)

        # Headers: scales, slots and weights, to every rank.
        headers_NB = torch.zeros(num_tokens, self._header.weights, dtype=torch.uint8, device=device)
        headers_NB[:, : self._header.scales].view(torch.float32).copy_(scale_inv_NG)
        slots, weights = wire.addresses(headers_NB, self._header)
        slots.copy_(slots_NK)
        weights.copy_(weights_NK)

        # Numbers only where they are wanted; the same place at every rank.
        tokens_P = torch.arange(num_tokens, device=device).repeat(num_ranks)
        places_P = (ranks_R.unsqueeze(1) * self.max_tokens + torch.arange(num_tokens, device=device)).flatten()
        self._values.put(values_ND.view(torch.uint8), tokens_P, torch.where(goes_NR.T.flatten(), places_P, NOWHERE))
        self._headers.put(headers_NB, tokens_P, places_P)
        # How many places of this rank's are filled, in the first one's header.
        count_R = torch.full((num_ranks, 1), num_tokens, dtype=torch.int32, device=device)
        first_places = ranks_R * self.max_tokens
        self._headers.put(count_R.view(torch.uint8), ranks_R, first_places, offset=self._header.weights)
        return (goes_NR.to(torch.int32) << ranks_R.to(torch.int32)).sum(dim=1, dtype=torch.int32)

    def received(self, ranks_N: Tensor) -> ExpertInputs:
        """Read the inboxes after delivery; `ranks_N` is what `send` returned."""
        headers_QB = self._headers.inbox_QB
        counts_R = wire.tail(headers_QB, self._header)[:: self.max_tokens]
        turns = torch.arange(self.max_tokens, device=self.ranks.device)
        filled_Q1 = (turns < counts_R.unsqueeze(1)).view(-1, 1)
        slots_QK, weights_QK = wire.addresses(headers_QB, self._header)
        local_QK = local_slots(slots_QK, self.slots_per_rank, self.ranks.rank)
        local_QK = torch.where(filled_Q1, local_QK, NOWHERE)
        counted = torch.zeros(self.slots_per_rank + 1, dtype=torch.int32, device=self.ranks.device)
        counted.scatter_add_(0, local_QK.flatten().long() + 1, torch.ones_like(local_QK).flatten())
        choice = Choice(local_QK, torch.where(local_QK >= 0, weights_QK, 0.0), counted[1:])
        scales_QG = headers_QB[:, : self._header.scales].view(torch.float32)
        columnwise = empty_scales(len(headers_QB), scales_QG.shape[1], self.ranks.device).copy_(scales_QG)
        return ExpertInputs(Quantised(self._values.inbox_QB.view(torch.float8_e4m3fn), columnwise), choice, ranks_N)

    def send_back(self, out_QD: Tensor, received: ExpertInputs) -> None:
        """Put rows [Q, D] that an expert here computed to the ranks they came from, in BF16."""
        places_Q = torch.arange(len(out_QD), device=out_QD.device)
        came_Q = (received.choice.indices_NK >= 0).any(dim=1)
        rows = out_QD.to(torch.bfloat16).contiguous().view(torch.uint8)
        self._returned.put(rows, places_Q, torch.where(came_Q, places_Q, NOWHERE))

    def summed(self, ranks_N: Tensor) -> Tensor:
        """Add up each token's rows after delivery, BF16 [N, D]."""
        returned_RND = self._returned.inbox_QB.view(torch.bfloat16).unflatten(0, (-1, self.max_tokens))
        total_ND = torch.zeros(len(ranks_N), self.hidden, device=ranks_N.device)
        for rank in range(self.ranks.num_ranks):
            came_N1 = (ranks_N >> rank & 1).bool().unsqueeze(1)
            total_ND = total_ND + torch.where(came_N1, returned_RND[rank, : len(ranks_N)].float(), 0.0)
        return total_ND.to(torch.bfloat16)


def routed_experts_over_ranks(
    form: FixedPlaces,
    x: Tensor | Quantised,
    indices_NK: Tensor,
    weights_NK: Tensor,
    experts: ExpertWeights,
    tables: SlotTables,
) -> Tensor:
    """A layer's routed experts in FP8, spread over ranks: BF16 [N, D]. Collective; `experts` are this rank's own,
    `tables` say where all lie.

    What `routed_experts_fp8` gives with all experts on one rank, but for one rounding to BF16 of each rank's share of a
    sum, and the order of the sum.
    """
    received = form.dispatch(x, indices_NK, weights_NK, tables)
    return form.combine(received_experts(form, received, experts), received)


def received_experts(form: FixedPlaces, received: ExpertInputs, experts: ExpertWeights) -> Tensor:
    """Compute this rank's experts on what arrived, BF16 [Q, D]."""
    # Places are for every token on every rank; of the choices in them one in R is this rank's, on average.
    num_pairs = received.choice.indices_NK.numel() // form.ranks.num_ranks
    tiling = default_tiling(num_pairs, form.slots_per_rank)
    return routed_experts_fp8(received.x, received.choice, experts, tiling=tiling)
