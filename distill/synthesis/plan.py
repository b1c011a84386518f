"""What is asked for, in which order: an endless row of attempts, the same whenever it is looked at.

Attempts go through the seeds, pass after pass, by the seeds' ids, which are hashes: their order in a file decides
nothing. The mode is drawn by a hash of seed and pass. So what attempt number 1,000 asks for does not depend on how many
questions are wanted, and a run that wants more goes on where another one ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from distill.problems.packed import PackedProblems
from distill.recipe import Mode, SynthesisedSource
from distill.records import Problem, content_id
from distill.synthesis.prompts import writing_problem

DRAW_DIGITS = 13  # of the hash: 52 bits, which a float holds


class Attempt(NamedTuple):
    """One request for a question: by which seed, in which mode, for the how-manieth time (from 0)."""

    seed: Problem
    mode: Mode
    turn: int

    def problem(self) -> Problem:
        return writing_problem(self.mode, self.seed)


class WritingPlan:
    """Attempts by the seeds, which are kept packed. There must be one at least."""

    def __init__(self, source: SynthesisedSource, seeds: Iterable[Problem]) -> None:
        self.seeds = PackedProblems(seeds)
        self._order = sorted(range(len(self.seeds)), key=self.seeds.id)
        self._weights = {mode: weight for mode, weight in source.modes.items() if weight}
        self._drawn_by = source.sampling.seed

    def attempts(self, begin: int, end: int) -> Iterator[Attempt]:
        """Attempts number `begin` to `end`, without the last, counted from 0."""
        for number in range(begin, end):
            turn, place = divmod(number, len(self._order))
            seed = self.seeds[self._order[place]]
            yield Attempt(seed, self._mode(seed.id, turn), turn)

    def _mode(self, seed_id: str, turn: int) -> Mode:
        drawn = int(content_id([self._drawn_by, seed_id, turn], digits=DRAW_DIGITS), 16) / 16**DRAW_DIGITS
        left = drawn * sum(self._weights.values())
        for mode, weight in self._weights.items():
            left -= weight
            if left < 0:
                return mode
        return mode
