"""Degenerate repetition: a text that ends in a loop, or that is mostly one.

A model that has lost its way says the same few sentences again and again until its tokens are spent. Such a text may
still hold the right answer; nobody should learn from it. `loop` looks for a stretch in which nearly all tokens are the
ones that stood one period before (so a counter, a changed word do not hide a loop), long enough and often enough
repeated that no honest list or table is one. The periods worth trying are the distances at which runs of words recur;
each is judged in one pass, so the whole is linear in the text.

It looks for verbatim loops alone: circling around a thought in new words is not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from distill.verify.extract import CLOSE

# A word (a long one in pieces, so that `hahaha...` is a loop too), one character of a script without spaces, one mark.
TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,16}|[^\w\s]"
)
GRAM = 6  # tokens in a run that must recur for its distance to count as a period
NUM_PERIODS = 4  # tried of each part of the text
TAILS = (400, 4_000)  # tokens: a loop that has only begun is drowned by what came before it
# What one fresh token costs, in repeated ones: honest lists move on in their numbers, loops seldom do.
WORD_COST, NUMBER_COST = 4, 24
MIN_REPEATS = 4.0
MIN_TOKENS = 60
MIN_TOKENS_WITHOUT_WORDS = 400  # zeros of a matrix, dots of a table
MIN_SHARE = 0.5
MAX_REST = 24  # tokens after a loop that still ends there: a cut word, a last stumble


class Loop(NamedTuple):
    """The repeated stretch is `text[start:end]`; `period` and `repeats` count tokens and rounds of it."""

    start: int
    end: int
    period: int
    repeats: float
    share: float  # of the text's tokens


def loop(text: str) -> Loop | None:
    """The longest loop that ends the text, ends its reasoning, or makes up half of it; None where there is none."""
    found = list(TOKEN.finditer(text))
    known: dict[str, int] = {}
    tokens = [known.setdefault(match.group().casefold(), len(known)) for match in found]
    costs = [NUMBER_COST if match.group()[0].isdigit() else WORD_COST for match in found]
    closed = text.rfind(CLOSE)
    ends = {len(tokens), sum(match.end() <= closed for match in found)} if closed >= 0 else {len(tokens)}
    best: Loop | None = None
    distances = _recurrences(tokens)
    for period in _periods(distances, ends):
        start, end = _longest_stretch(tokens, distances, costs, period)
        length = end - start
        if length < max(MIN_TOKENS, MIN_REPEATS * period):
            continue
        worded = any(any(c.isalpha() for c in match.group()) for match in found[end - period : end])
        at_an_end = any(end <= last <= end + max(2 * period, MAX_REST) for last in ends)
        share = length / len(tokens)
        if length < (MIN_TOKENS if worded else MIN_TOKENS_WITHOUT_WORDS) or not (at_an_end or share >= MIN_SHARE):
            continue
        if best is None or share > best.share:
            best = Loop(found[start].start(), found[end - 1].end(), period, length / period, share)
    return best


def _recurrences(tokens: Sequence[int]) -> list[int]:
    """Tell for each token how far back the run of GRAM tokens that begins there stood last; 0 where it is new."""
    last: dict[tuple[int, ...], int] = {}
    distances = [0] * len(tokens)
    for index in range(len(tokens) - GRAM + 1):
        gram = tuple(tokens[index : index + GRAM])
        distances[index] = index - last.get(gram, index)
        last[gram] = index
    return distances


def _periods(distances: Sequence[int], ends: set[int]) -> list[int]:
    """The commonest distances: in all the text, and in what precedes its ends."""
    parts = [(0, len(distances)), *((max(0, end - tail), end) for end in ends for tail in TAILS)]
    tried: dict[int, None] = {}
    for start, end in parts:
        counted = Counter(distance for distance in distances[start:end] if distance)
        tried.update(dict.fromkeys(period for period, _ in counted.most_common(NUM_PERIODS)))
    return list(tried)


def _longest_stretch(
    tokens: Sequence[int], distances: Sequence[int], costs: Sequence[int], period: int
) -> tuple[int, int]:
    """Find where repeating at `period` pays most (Kadane's maximum-sum run), with the first round that is repeated.

    A token repeats if it is the one a period before, or (a word) two periods where that one is the stumble, or if it
    stands in a run that recurs at about that distance: where a word was dropped, the whole next round is shifted.
    """
    best = (0, 0, 0)
    start, score, covered = period, 0, 0
    for index in range(period, len(tokens)):
        if distances[index] and abs(distances[index] - period) <= 2 + period // 16:
            covered = index + GRAM
        repeats = index < covered or tokens[index] == tokens[index - period]
        if not repeats and costs[index] == WORD_COST:
            repeats = tokens[index] == tokens[max(0, index - 2 * period)]
        score += 1 if repeats else -costs[index]
        if score <= 0:
            start, score = index + 1, 0
        elif score > best[0]:
            best = (score, start - period, index + 1)
    return best[1], best[2]
