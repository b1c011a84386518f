"""How often a text has each token: what penalties on repetition are computed from (`sampler`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class SeenTokens(NamedTuple):
    """Tokens that a text has, int64, each once, and how often its answer has them; zero: its prompt alone does."""

    tokens: np.ndarray
    counts: np.ndarray


class TokenCounts:
    """The tokens of `prompt_ids`, and those of the answer as they are pushed. A token costs one look-up."""

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._tokens, self._counts = array("q"), array("q")
        for token in prompt_ids:
            self._place_of(token)

    def push(self, token: int) -> None:
        self._counts[self._place_of(token)] += 1

    def seen(self, drafts: Iterable[int] = ()) -> SeenTokens:
        """The counts as they would be if `drafts` came next."""
        tokens, counts = np.array(self._tokens), np.array(self._counts)
        for draft in drafts:
            if (place := self._place.get(draft)) is not None:
                counts[place] += 1
            else:
                tokens, counts = np.append(tokens, draft), np.append(counts, 1)
        return SeenTokens(tokens, counts)

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        return place
