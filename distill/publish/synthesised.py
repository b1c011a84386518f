"""What cards say of questions that a teacher wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.records import StageManifest

Steps = Sequence[Mapping[str, Any]]


def question_funnels(generated: StageManifest | None) -> dict[str, Steps]:
    """The funnel of every synthesised source, by its name."""
    counts = {} if generated is None else generated.counts.get("synthesised", {})
    return {name: of_source["funnel"] for name, of_source in counts.items()}


def funnel_lines(funnels: Mapping[str, Steps]) -> Iterator[str]:
    """`synthesised: 300 questions asked for -> readable 290 -> ... -> count 100`, a line each."""
    for name, steps in funnels.items():
        passed = " -> ".join(f"{step['filter'].replace('_', ' ')} {step['out']:,}" for step in steps)
        yield f"{name}: {steps[0]['in']:,} questions asked for -> {passed}"
