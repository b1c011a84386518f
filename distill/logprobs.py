"""The teacher's distribution at every token, kept on request (`Sampling.top_logprobs`) for logit distillation.

Natural logarithms of the model's own probabilities: of the raw logits, before temperature and nucleus. One entry a
generated token, the end token and forced tokens included. A token is its id where the backend knows ids (`unit: id`:
the native engine, vLLM with `return_tokens_as_token_ids`), else its text (`unit: text`), which may stand for several
ids. A token that was forced through an endpoint has no numbers (None, and no likeliest tokens). Packed as compact
JSON, which is what `Completion.logprobs` and the ledger hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Scored = tuple[int | str, float | None]

# JSON has no minus infinity; a token that cannot come has this logarithm (vLLM writes the same).
IMPOSSIBLE = -9999.0
# FP32 logits of one token differ by about 1e-5 between a batch of one and a batch of many: more digits say nothing.
DIGITS = 5


@dataclass(frozen=True)
class TokenLogprobs:
    """`sampled[t]` is the token that was written and its logprob, `top[t]` the likeliest ones, best first."""

    unit: Literal["id", "text"]
    sampled: list[Scored]
    top: list[list[Scored]]

    def packed(self) -> str:
        tree = {
            "unit": self.unit,
            "sampled": [_round(pair) for pair in self.sampled],
            "top": [[_round(pair) for pair in pairs] for pairs in self.top],
        }
        return json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def unpacked(cls, text: str) -> TokenLogprobs:
        """The inverse of `packed`. Raises ValueError, KeyError or TypeError for what it did not write."""
        tree = json.loads(text)
        top = [[(token, logprob) for token, logprob in pairs] for pairs in tree["top"]]
        return cls(tree["unit"], [(token, logprob) for token, logprob in tree["sampled"]], top)

    def followed_by(self, other: TokenLogprobs) -> TokenLogprobs:
        """The entries of a completion that was written in two parts."""
        if self.unit != other.unit:
            raise ValueError(f"entries by {self.unit} cannot be followed by entries by {other.unit}")
        return TokenLogprobs(self.unit, self.sampled + other.sampled, self.top + other.top)


def _round(pair: Scored) -> Scored:
    token, logprob = pair
    return token, None if logprob is None else max(IMPOSSIBLE, round(logprob, DIGITS))
