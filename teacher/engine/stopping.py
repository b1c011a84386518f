"""Endings of a text before the model ends it: it contains a stop string, or it goes round in circles.

Both are judged token by token at a cost that does not grow with the text. A stop string counts from the character that
completes it, whatever tokens it came in; a loop is the tail of the tokens repeated, as vLLM's `repetition_detection`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from teacher.engine.detokenizer import Decode, Detokenizer


class StopStrings:
    """Finds the first end of any stop string in a text that comes in pieces (Knuth, Morris and Pratt's automaton)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self.behind = ""  # what its last piece had behind it
        self._stops = [stop for stop in stops if stop]
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each the text ends with
        self._held = ""  # the end of the text that may be the beginning of one

    def feed(self, piece: str) -> str:
        """The text that is certain to stand before any stop string, and was not certain before.

        Nothing more comes once one is `found`, which is the longest of those that end there.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        for place, character in enumerate(piece, start=len(self._held) + 1):
            for number, stop in enumerate(self._stops):
                fallback, matched = self._fallbacks[number], self._matched[number]
                while matched and stop[matched] != character:
                    matched = fallback[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop) and len(stop) > len(self.found or ""):
                    self.found = stop
                self._matched[number] = matched
            if self.found is not None:
                self._held, self.behind = "", text[place:]
                return text[: place - len(self.found)]
        certain = len(text) - max(self._matched, default=0)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """Release what was held back, now that the text has ended; nothing where a stop string ended it."""
        held, self._held = self._held, ""
        return held


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first stop string, and which one that was."""
    finder = StopStrings(stops)
    return finder.feed(text) + finder.rest(), finder.found


@dataclass(frozen=True)
class RepetitionLimit:
    """A text ends where its last 1 to `max_pattern_size` tokens (from `min_pattern_size` on) have come `min_count`
    times running, and make up `min_tokens` at least: rows of zeros and short lists are no loops."""

    max_pattern_size: int = 256
    min_pattern_size: int = 1
    min_count: int = 4
    min_tokens: int = 256


class Repetition:
    """Watches for a loop; a token costs a search of the last `max_pattern_size` ones and a step for each like it."""

    def __init__(self, limit: RepetitionLimit) -> None:
        self._limit = limit
        self._last: deque[int] = deque(maxlen=limit.max_pattern_size)  # newest first
        self._runs: dict[int, int] = {}  # period: how many tokens in a row were the one a period before

    def push(self, token: int) -> bool:
        """Take a token and tell whether the text loops with it."""
        limit, runs, looping = self._limit, {}, False
        place = -1
        for _ in range(self._last.count(token)):
            place = self._last.index(token, place + 1)
            period = place + 1
            runs[period] = run = self._runs.get(period, 0) + 1
            if period >= limit.min_pattern_size:
                looping |= run + period >= max(period * limit.min_count, limit.min_tokens)
        self._runs = runs
        self._last.appendleft(token)
        return looping


class Watch:
    """The endings that one sequence can come to, beside its end token and its length."""

    def __init__(self, stops: Sequence[str], repetition: RepetitionLimit | None, decode: Decode | None) -> None:
        self._stops = StopStrings(stops)
        self._text = Detokenizer(decode) if stops and decode is not None else None
        self._repetition = None if repetition is None else Repetition(repetition)

    def ends_with(self, token: int) -> Literal["stop", "repetition"] | None:
        if self._text is not None:
            self._stops.feed(self._text.push([token]))
            if self._stops.found is not None:
                return "stop"
        if self._repetition is not None and self._repetition.push(token):
            return "repetition"
        return None


def _fallbacks(stop: str) -> list[int]:
    """Lengths, for each beginning of `stop`, of the longest shorter beginning that it ends with."""
    lengths = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = lengths[matched - 1]
        matched += stop[matched] == stop[place]
        lengths[place] = matched
    return lengths
