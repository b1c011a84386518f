"""Traces to training examples: filters in a fixed order, each a switch of CurateConfig, each counted in the funnel.

`curate` sifts what fits into memory; `sift` and `outcomes` are its two halves for what does not.
"""

from distill.curate.candidates import Dropped, GradedTrace
from distill.curate.filters import repetition
from distill.curate.funnel import Curated, Sifted, curate, outcomes, sift
from distill.curate.shown import DroppedExamples

__all__ = ["Curated", "Dropped", "DroppedExamples", "GradedTrace", "Sifted", "curate", "outcomes", "repetition", "sift"]
