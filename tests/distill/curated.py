"""Curation of traces that fit into memory, by its two halves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from distill.curate import DroppedTrace, ExampleForm, filter_traces, outcomes
from distill.curate.funnel import HeldOut
from distill.recipe import UNINSTRUCTED, CurateConfig
from distill.records import Example, Problem, Trace, Verdict

R1_FORM = ExampleForm("tagged", UNINSTRUCTED)


class CurationResult(NamedTuple):
    examples: list[Example]
    direct_examples: list[Example]
    funnel: list[dict[str, Any]]
    dropped: list[DroppedTrace]


def curate(
    problems: Iterable[Problem],
    traces: Sequence[Trace],
    verdicts: Sequence[Verdict],
    config: CurateConfig,
    held_out: HeldOut,
    form: ExampleForm = R1_FORM,
) -> CurationResult:
    """Filter traces that fit into memory: examples, their bare-answer twins, the funnel, what was dropped and why.

    `verdicts` belong to `traces` one by one; everything comes out in the order of the traces.
    """
    by_id = {problem.id: problem for problem in problems}
    graded = list(zip(traces, verdicts, strict=True))
    filtered = filter_traces(by_id, lambda: graded, config, held_out, form.reasoning)
    curated = CurationResult([], [], filtered.funnel, [])
    for _, one in outcomes(by_id, graded, filtered.dropped, form):
        if isinstance(one, DroppedTrace):
            curated.dropped.append(one)
        else:
            target = curated.examples if one.trace_key is not None else curated.direct_examples
            target.append(one)
    return curated
