"""Static tensors from which CUDA graphs read what changes from step to step, and how the host fills them.

A graph remembers addresses, so its inputs must lie where they lay when it was captured: they are made once, for the
largest batch, and every graph of a smaller one reads their beginnings. Each fill is one copy from pinned memory that
the host does not wait for; copies and replays are ordered by the stream. Pinned memory that such a copy still reads is
not handed out again before it is done (torch's caching allocator sees to that), so each fill takes memory of its own.

Shape legend: B sequences, padding included; M rows, T = one or two of each; Z tokens of the step before; Q pages a
sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher.engine.prompt_inputs import PromptInputs
from teacher.engine.scheduler import Chunk
from teacher.engine.seats import Seats
from teacher.engine.sequence import Sequence


class _Columns(NamedTuple):
    """Columns of `GraphInputs.sampling_B8`: uniform numbers of the next tokens, and the cuts of `kernels.sample`.

    With drafts a step uses three of the numbers, for its two tokens and the draft, and begins at the second of four
    where a token more than the host knew of has been written.
    """

    uniform: slice = slice(0, 4)
    top_p: slice = slice(4, 5)
    min_p: slice = slice(5, 6)
    top_k: slice = slice(6, 7)
    temperature: slice = slice(7, 8)


COLUMNS = _Columns()


class CarriedInputs(NamedTuple):
    """Inputs that a graph with drafts overwrites with those of the step behind it.

    A sequence's `lengths` counts the rows of this step; `behind` is how many tokens were written since the host knew.
    """

    token_ids_BT: Tensor
    lengths_B: Tensor
    behind_B: Tensor


class GraphInputs:
    """Inputs of all graphs of one model: up to `max_sequences` with `num_queries` rows each, one short prompt, or many
    together, of up to `rows_together` tokens; 0: the model does not read them so."""

    def __init__(
        self,
        max_sequences: int,
        num_queries: int,
        num_pages: int,
        max_prompt_rows: int,
        rows_together: int,
        device: torch.device,
    ) -> None:
        self.num_queries = num_queries
        self.num_pages = num_pages
        self._device = device
        num_rows = max_sequences * num_queries
        self.carried = CarriedInputs(
            torch.zeros(max_sequences, num_queries, dtype=torch.int64, device=device),
            torch.zeros(max_sequences, dtype=torch.int32, device=device),
            torch.zeros(max_sequences, dtype=torch.int64, device=device),
        )
        self.sampling_B8 = torch.ones(max_sequences, 8, dtype=torch.float64, device=device)
        self.pages_BQ = torch.zeros(max_sequences, num_pages, dtype=torch.int32, device=device)
        self.before_Z = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # For drafts that the host asks for: the token after each row, and the row to draft at.
        self.next_ids_M = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.draft_rows_B = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self.prompt_M = torch.zeros(max_prompt_rows, dtype=torch.int64, device=device)
        self.prompt_start, self.prompt_end = torch.zeros(2, 1, dtype=torch.int32, device=device)
        self.prompts = PromptInputs(rows_together, num_pages, device) if rows_together else None
        self._seats = Seats(max_sequences, num_pages)

    def fill_rows(self, chunks: list[Chunk[Any]], size: int) -> None:
        """Put tokens and lengths of decoding sequences, and padding up to `size` of them."""
        num_rows = size * self.num_queries
        host = self._on_host(num_rows + size)
        numbers = host.numpy()
        if self.num_queries == 1:
            tokens = [(chunk.sequence.generated_ids or chunk.sequence.prompt_ids)[-1] for chunk in chunks]
            numbers[num_rows : num_rows + len(chunks)] = [chunk.start + 1 for chunk in chunks]
        else:
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            numbers[num_rows : num_rows + len(chunks)] = [chunk.end for chunk in chunks]
        numbers[: len(tokens)] = tokens
        there = host.to(self._device, non_blocking=True)
        self.carried.token_ids_BT[:size] = there[:num_rows].view(size, -1)
        self.carried.lengths_B[:size] = there[num_rows:]
        if self.num_queries > 1:
            self.carried.behind_B.zero_()

    def fill_before(self, before_Z: Tensor) -> None:
        """Put the tokens of the step before, to which placeholders refer; from the device to the device."""
        self.before_Z[: len(before_Z)] = before_Z

    def fill_prompt(self, chunk: Chunk[Any], num_rows: int) -> None:
        """Put what is left of a prompt, padded behind its end to `num_rows`."""
        host = self._on_host(num_rows + 2)
        host[: chunk.count] = torch.tensor(chunk.token_ids)
        host[num_rows], host[num_rows + 1] = chunk.start, chunk.end
        there = host.to(self._device, non_blocking=True)
        self.prompt_M[:num_rows], self.prompt_start[:], self.prompt_end[:] = there.split((num_rows, 1, 1))

    def fill_pages(self, sequences: list[Sequence[Any]]) -> list[int]:
        """Put the sequences' page tables, and return how many pages each has."""
        num_pages = [len(sequence.pages) for sequence in sequences]
        pages_BQ = self._seats.pages_of(sequences, max(num_pages))
        host = self._on_host(pages_BQ.size).view(pages_BQ.shape)
        host.numpy()[:] = pages_BQ
        self.pages_BQ[: len(sequences), : pages_BQ.shape[1]] = host.to(self._device, non_blocking=True)
        return num_pages

    def fill_sampling(self, sequences: list[Sequence[Any]], known_ahead: int = 0, into: Tensor | None = None) -> None:
        """Put each sequence's uniform numbers and sampling parameters, `into` another table where one is given.

        `known_ahead` tokens of each are certain to be written by the step under way, beside its placeholders.
        """
        pinned = self._device.type == "cuda"
        host = torch.zeros(len(sequences), 8, dtype=torch.float64, pin_memory=pinned)
        table = host.numpy()
        for column in range(1 if self.num_queries == 1 else 4):
            table[:, column] = Sequence.uniforms_of(sequences, known_ahead + column)
        table[:, 4:] = self._seats.settings_of(sequences)
        there = self.sampling_B8 if into is None else into
        there[: len(sequences)].copy_(host, non_blocking=True)

    def fill_draft_rows(self, next_ids: list[int], rows: list[int], size: int) -> None:
        """Put the token after each row, and the rows to draft at."""
        num_rows = size * self.num_queries
        host = self._on_host(num_rows + size)
        numbers = host.numpy()
        numbers[: len(next_ids)] = next_ids
        numbers[num_rows : num_rows + len(rows)] = rows  # padding drafts at the first row
        there = host.to(self._device, non_blocking=True)
        self.next_ids_M[:num_rows] = there[:num_rows]
        self.draft_rows_B[:size] = there[num_rows:]

    def _on_host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
