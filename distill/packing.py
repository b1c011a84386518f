"""Whole documents into rows of equal length: no document is cut, every row starts with a document's first token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Document(NamedTuple):
    """Token ids, and how many leading ones are context that the loss leaves out."""

    ids: Sequence[int]
    num_context: int = 0


class Rows(NamedTuple):
    """`ids[r, t]` and `is_target[r, t]`: whether token t is one the model is trained to predict. Padding is neither."""

    ids: npt.NDArray[np.uint16]
    is_target: npt.NDArray[np.bool_]


def pack_rows(documents: Sequence[Document], *, row_length: int, pad_id: int, open_rows: int = 16) -> Rows:
    """First fit over a few open rows; a document longer than a row is a ValueError."""
    bins: list[list[Document]] = []
    open_bins: list[tuple[int, list[Document]]] = []
    for document in documents:
        size = len(document.ids)
        if size > row_length:
            raise ValueError(f"a document of {size} tokens does not fit rows of {row_length}")
        for index, (free, members) in enumerate(open_bins):
            if size <= free:
                members.append(document)
                open_bins[index] = (free - size, members)
                break
        else:
            if len(open_bins) == open_rows:
                fullest = min(range(open_rows), key=lambda i: open_bins[i][0])
                bins.append(open_bins.pop(fullest)[1])
            open_bins.append((row_length - size, [document]))
    bins.extend(members for _, members in open_bins)
    ids = np.full((len(bins), row_length), pad_id, dtype=np.uint16)
    is_target = np.zeros((len(bins), row_length), dtype=np.bool_)
    for row, members in enumerate(bins):
        at = 0
        for document in members:
            end = at + len(document.ids)
            ids[row, at:end] = document.ids
            is_target[row, at + document.num_context : end] = True
            at = end
    return Rows(ids, is_target)


def concatenate(parts: Sequence[Rows], *, seed: int) -> Rows:
    """All rows of all parts in an order drawn from `seed`."""
    order = list(range(sum(len(part.ids) for part in parts)))
    random.Random(seed).shuffle(order)
    return Rows(
        np.concatenate([part.ids for part in parts])[order], np.concatenate([part.is_target for part in parts])[order]
    )
