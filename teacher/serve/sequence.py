"""One request on its way through the engine."""

from __future__ import annotations

import random
from collections.abc import Hashable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class Sequence(Generic[Key]):
    """Prompt, what was generated so far, and the sequence's own source of randomness.

    `seed` alone decides the random numbers, so a request draws the same tokens whatever else is in the batch (up to
    rounding in the logits). `key` is the caller's.
    """

    key: Key
    prompt_ids: Tokens[int]
    max_tokens: int
    seed: int
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    _random: random.Random | None = None

    def draw(self) -> float:
        """The next uniform number in [0, 1) of this sequence. Python's generator is the same in every version."""
        if self._random is None:
            self._random = random.Random(self.seed)
        return self._random.random()

    def append(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Take a sampled token. An end token is kept in `generated_ids` and ends the sequence."""
        self.generated_ids.append(token)
        if token in eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.generated_ids) >= self.max_tokens:
            self.finish_reason = "length"

    @property
    def num_cached(self) -> int:
        """Tokens whose latents are in the cache: all but the newest."""
        return len(self.prompt_ids) + max(len(self.generated_ids) - 1, 0)
