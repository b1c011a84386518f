"""Traces to training examples: filters in a fixed order, each a switch of CurateConfig, each counted in the funnel.

`filter_traces` decides what is dropped, in passes over traces that need not fit into memory; `outcomes` makes examples.
"""

from distill.curate.candidates import DroppedTrace, GradedTrace
from distill.curate.filters import repetition
from distill.curate.form import ExampleForm
from distill.curate.funnel import FilterResult, filter_traces, outcomes
from distill.curate.lost import LostSamples
from distill.curate.shown import DroppedExamples

__all__ = [
    "DroppedExamples",
    "DroppedTrace",
    "ExampleForm",
    "FilterResult",
    "GradedTrace",
    "LostSamples",
    "filter_traces",
    "outcomes",
    "repetition",
]
