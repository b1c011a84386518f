"""Packing: what goes in comes out whole, and the loss sees exactly what it should."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from distill.packing import Document, Rows, concatenate, pack_rows

PAD = 3
FIRST = 1_000  # document i begins with token FIRST + i, which occurs nowhere else
MAX_LENGTH = 24


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    bodies = draw(st.lists(st.lists(st.integers(0, 60), max_size=MAX_LENGTH - 1), max_size=60))
    made = []
    for number, body in enumerate(bodies):
        ids = [FIRST + number, *(token for token in body)]
        made.append(Document(ids, draw(st.integers(0, len(ids)))))
    return made


def unpacked(rows: Rows, given: list[Document]) -> list[Document]:
    """Read rows token by token: documents side by side from the first place on, then padding alone."""
    found = []
    for ids, is_target in zip(rows.ids.tolist(), rows.is_target.tolist(), strict=True):
        assert ids[0] >= FIRST, "a row starts with a document"
        at = 0
        while at < len(ids) and ids[at] >= FIRST:
            size = len(given[ids[at] - FIRST].ids)
            targets = is_target[at : at + size]
            num_context = targets.count(False)
            assert targets == [False] * num_context + [True] * (size - num_context)
            found.append(Document(ids[at : at + size], num_context))
            at += size
        assert set(ids[at:]) <= {PAD}
        assert not any(is_target[at:])
    return found


@settings(max_examples=150, deadline=None)
@given(documents(), st.integers(MAX_LENGTH, 3 * MAX_LENGTH), st.integers(1, 5))
def test_every_document_is_whole_and_its_targets_are_what_is_not_context(
    given_: list[Document], row_length: int, open_rows: int
) -> None:
    rows = pack_rows(given_, row_length=row_length, pad_id=PAD, open_rows=open_rows)
    assert rows.ids.shape == rows.is_target.shape == (len(rows.ids), row_length)
    found = unpacked(rows, given_)
    assert sorted(found) == sorted(given_)
    assert rows.is_target.sum() == sum(len(document.ids) - document.num_context for document in given_)
    assert len(rows.ids) <= len(given_)


@settings(max_examples=60, deadline=None)
@given(documents(), documents(), st.integers(0, 9))
def test_concatenating_shuffles_rows_and_keeps_them_whole(a: list[Document], b: list[Document], seed: int) -> None:
    parts = [pack_rows(part, row_length=MAX_LENGTH, pad_id=PAD) for part in (a, b)]
    whole = concatenate(parts, seed=seed)

    def pairs(rows: Rows) -> Counter[tuple[bytes, bytes]]:
        return Counter((i.tobytes(), t.tobytes()) for i, t in zip(rows.ids, rows.is_target, strict=True))

    assert pairs(whole) == pairs(parts[0]) + pairs(parts[1])
    again = concatenate(parts, seed=seed)
    assert np.array_equal(whole.ids, again.ids)
    assert np.array_equal(whole.is_target, again.is_target)


def test_another_seed_is_another_order() -> None:
    part = pack_rows([Document([FIRST + n] * 5) for n in range(64)], row_length=5, pad_id=PAD)
    orders = {concatenate([part], seed=seed).ids.tobytes() for seed in range(4)}
    assert len(orders) == 4


def test_little_is_wasted_on_padding() -> None:
    sizes = np.random.default_rng(5).integers(20, 180, 2_000)
    rows = pack_rows([Document([1] * int(size)) for size in sizes], row_length=256, pad_id=PAD)
    assert sizes.sum() / rows.ids.size > 0.9  # a row a document would be at 0.39


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit rows of 8"):
        pack_rows([Document([1] * 8), Document([1] * 9)], row_length=8, pad_id=PAD)
