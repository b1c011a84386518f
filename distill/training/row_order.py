"""The rows of a corpus that each step learns from: a function of seed and step, so that a run can be resumed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DataPosition(NamedTuple):
    """A step's place in the data: the pass over all rows, and how many of its rows were used before."""

    epoch: int
    rows_used: int


class RowOrder:
    """All rows once an epoch, `rows_per_step` a step, in an order drawn from `seed`."""

    def __init__(self, num_rows: int, rows_per_step: int, *, seed: int) -> None:
        self.num_rows, self.rows_per_step, self.seed = num_rows, rows_per_step, seed
        self.steps_per_epoch = max(1, num_rows // rows_per_step)
        self._generator, self._epochs_drawn = torch.Generator().manual_seed(seed), 0
        self._batches: list[Tensor] = []

    def position(self, step: int) -> DataPosition:
        epoch, within = divmod(step, self.steps_per_epoch)
        return DataPosition(epoch, within * self.rows_per_step)

    def rows(self, step: int) -> Tensor:
        """int64 [rows_per_step], fewer only where there are fewer rows in all."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch < self._epochs_drawn - 1:
            self._generator, self._epochs_drawn = torch.Generator().manual_seed(self.seed), 0
        while self._epochs_drawn <= epoch:
            order = torch.randperm(self.num_rows, generator=self._generator)
            batches = torch.split(order, self.rows_per_step)
            self._batches = [rows for rows in batches if len(rows) == self.rows_per_step] or list(batches)
            self._epochs_drawn += 1
        return self._batches[-1 - within]
