"""Traces to training examples: filters in a fixed order, each a switch of CurateConfig, each counted in the funnel.

`curate` filters what fits into memory; `filter_traces` and `outcomes` are its two halves for what does not.
"""

from distill.curate.candidates import DroppedTrace, GradedTrace
from distill.curate.filters import repetition
from distill.curate.funnel import CurationResult, FilterResult, curate, filter_traces, outcomes
from distill.curate.shown import DroppedExamples

__all__ = [
    "CurationResult",
    "DroppedExamples",
    "DroppedTrace",
    "FilterResult",
    "GradedTrace",
    "curate",
    "filter_traces",
    "outcomes",
    "repetition",
]
