"""What the host tells a GPU of each decoding sequence at every step, kept in tables instead of being made anew.

A sequence has a seat, a row, from its first step on for as long as it has its pages: its sampling parameters are
written there once, and its pages as they are added. A step's tables are then a few operations over all of its rows at
once, where to look at each sequence's pages and parameters would take the host longer than the step takes the device. A
list of pages is new whenever a sequence gets a place in the cache, so the list itself tells who has a seat.

Shape legend: B sequences of a step, Q pages a sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teacher.engine.sequence import Sequence

_ALL_TOKENS = np.iinfo(np.int32).max


class Seats:
    """Seats for `max_sequences` that have pages at once, `num_pages` of them each at most."""

    def __init__(self, max_sequences: int, num_pages: int) -> None:
        self._pages = np.zeros((max_sequences, num_pages), np.int32)
        self._settings = np.ones((max_sequences, 4))
        self._num_pages = [0] * max_sequences
        self._owners: list[Sequence[Any] | None] = [None] * max_sequences
        self._held: list[list[int] | None] = [None] * max_sequences
        self._free = list(range(max_sequences))[::-1]

    def pages_of(self, sequences: list[Sequence[Any]], width: int) -> np.ndarray:
        """Page tables, int32 [B, width], zero behind a sequence's last."""
        return self._pages[self._rows_of(sequences), :width]

    def settings_of(self, sequences: list[Sequence[Any]]) -> np.ndarray:
        """FP64 [B, 4]: top_p, min_p, top_k (the largest int32: all tokens), temperature."""
        return self._settings[self._rows_of(sequences)]

    def _rows_of(self, sequences: list[Sequence[Any]]) -> list[int]:
        held, known, rows = self._held, self._num_pages, []
        for sequence in sequences:
            seat, pages = sequence.seat, sequence.pages
            if seat < 0 or held[seat] is not pages:
                seat = self._take(sequence)
            elif known[seat] != len(pages):
                self._pages[seat, known[seat] : len(pages)] = pages[known[seat] :]
                known[seat] = len(pages)
            rows.append(seat)
        return rows

    def _take(self, sequence: Sequence[Any]) -> int:
        if not self._free:
            self._leave()
        sequence.seat = seat = self._free.pop()
        pages, params = sequence.pages, sequence.sampling_params
        self._owners[seat], self._held[seat], self._num_pages[seat] = sequence, pages, len(pages)
        self._pages[seat] = 0
        self._pages[seat, : len(pages)] = pages
        self._settings[seat] = params.top_p, params.min_p, params.top_k or _ALL_TOKENS, params.temperature
        return seat

    def _leave(self) -> None:
        """Those who have given their pages away leave their seats."""
        for seat, owner in enumerate(self._owners):
            if owner is not None and owner.pages is not self._held[seat]:
                self._owners[seat] = self._held[seat] = None
                self._free.append(seat)
