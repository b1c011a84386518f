"""Scores that a known model has on a suite, with their protocol and source, and whether a score of ours agrees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from distill.errors import RecipeError, nearest
from distill.intervals import wilson
from distill.reading.yaml_text import read_yaml
from distill.recipe import Config, parse
from distill.records import Sampling, ScoreCard

REFERENCES = Path(__file__).with_name("references.yaml")


class Reference(Config):
    """One published or measured pass@1, in percent."""

    model: str = Field(description="checkpoint folder, or a repository of the Hub")
    suite: str
    value: float = Field(ge=0, le=100)
    stderr: float | None = Field(None, gt=0, description="clustered by question; none: its source does not say")
    num_questions: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    sampling: Sampling
    reasoning: Literal["tagged", "plain"] = "tagged"
    source: str = Field(min_length=1)

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's, in [0, 1]: of as many questions as its standard error stands for, else of all that were asked."""
        share = self.value / 100
        effective = float(self.num_questions)
        if self.stderr is not None and 0 < share < 1:
            effective = share * (1 - share) / (self.stderr / 100) ** 2
        return wilson(share * effective, effective)


@dataclass(frozen=True)
class Reproduction:
    """A score of ours beside its reference: `difference` is ours minus theirs, all in [0, 1]."""

    name: str
    value: float
    reference: float
    difference: float
    ci95: tuple[float, float]
    source: str

    @property
    def inside(self) -> bool:
        """The interval of the difference holds zero."""
        return self.ci95[0] <= 0 <= self.ci95[1]


@cache
def references() -> dict[str, Reference]:
    tree = read_yaml(REFERENCES, RecipeError)
    return {name: parse(Reference, entry, where=REFERENCES) for name, entry in tree.items()}


def find_reference(name: str) -> Reference:
    """Raises RecipeError for a name that is not there."""
    known = references()
    if name not in known:
        raise RecipeError(f"no such reference; {nearest(name, known)}", where=name)
    return known[name]


def reproduction(name: str, reference: Reference, card: ScoreCard) -> Reproduction:
    """`card` is ours on the reference's suite, pass@1.

    The interval of the difference joins the two as Newcombe 1998 does (method 10; Zou and Donner 2008, eq. 7),
    which keeps them uneven near 0 and 1. It takes the evaluations as independent, though their questions are the same:
    it is rather too wide.
    """
    theirs = reference.value / 100
    low, high = reference.ci95
    difference = card.value - theirs
    below = math.hypot(card.value - card.ci95[0], high - theirs)
    above = math.hypot(card.ci95[1] - card.value, theirs - low)
    interval = (difference - below, difference + above)
    return Reproduction(name, card.value, theirs, difference, interval, reference.source)
