"""Packed logprobs come back as they were, to the digits that are kept."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, strategies as st

from distill.logprobs import IMPOSSIBLE, TokenLogprobs

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LOGPROBS = st.floats(-1e4, 0) | st.just(-math.inf)


@given(st.sampled_from([("id", st.integers(0, 2**18)), ("text", TEXT)]), st.data())
def test_packing_is_undone_by_unpacking(unit_and_tokens: tuple[str, st.SearchStrategy], data: st.DataObject) -> None:
    unit, tokens = unit_and_tokens
    pairs = st.tuples(tokens, LOGPROBS)
    entries = data.draw(st.lists(st.tuples(pairs, st.lists(pairs, max_size=3)), max_size=4))
    packed = TokenLogprobs(unit, [own for own, _ in entries], [top for _, top in entries]).packed()
    assert "\n" not in packed
    found = TokenLogprobs.unpacked(packed)
    assert (found.unit, len(found.top)) == (unit, len(entries))
    for (own, top), read, tops in zip(entries, found.sampled, found.top, strict=True):
        for (token, logprob), (as_read, as_kept) in zip([own, *top], [read, *tops], strict=True):
            assert as_read == token
            assert as_kept == pytest.approx(max(logprob, IMPOSSIBLE), abs=6e-6)
    assert found.packed() == packed


def test_two_parts_are_one_completion_only_where_tokens_are_named_alike() -> None:
    first, second = TokenLogprobs("id", [(7, -0.5)], [[(7, -0.5)]]), TokenLogprobs("id", [(8, -1.0)], [[(9, -0.1)]])
    both = first.followed_by(second)
    assert json.loads(both.packed()) == {
        "unit": "id",
        "sampled": [[7, -0.5], [8, -1.0]],
        "top": [[[7, -0.5]], [[9, -0.1]]],
    }
    with pytest.raises(ValueError, match="by id cannot be followed by entries by text"):
        first.followed_by(TokenLogprobs("text", [("x", 0.0)], [[]]))
