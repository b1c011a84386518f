"""Batches of like lengths in a random order that depends on seed and epoch alone.

transformers' own length grouping draws from the global random state, so that a run resumed in the middle of an epoch
would see another order, and it walks every pool from its longest batch to its shortest. This sampler keeps padding as
low, shuffles the batches over the whole epoch, and gives the same order to every process and every resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 16  # batches sorted together: larger pads less, smaller mixes more


class LengthBuckets(Sampler[int]):
    """Indices such that each `batch_size` consecutive ones are examples of like length; the odd rest comes last."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch_size
        order, rest = order[:whole], order[whole:]
        pool = POOL * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, pool):
            alike = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from rest
