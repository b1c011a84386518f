"""Settings of scoring models and of pushing models and traces."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.licences import Licence
from distill.recipe.config import BatchSize, Config, Distinct, Mark
from distill.recipe.problems import HeldOutSource
from distill.records import Role, Sampling

# Suites of the recipe's own held-out problems: one that is named for what it is, and that of the bundled scale.
OWN_SUITES = ("held_out", "pico")


class ContestDates(Config):
    """Which questions of a suite that dates them (LiveCodeBench) are asked: those of contests between two days.

    A model cannot have learned a question that was published after its training data were gathered. R1's own window is
    2024-08-01 to 2025-01-31 (arXiv 2501.12948, section 3).
    """

    first: date | None = Field(None, description="the first day; none: from the beginning")
    last: date | None = Field(None, description="the last day, inclusive; none: to the end")

    @model_validator(mode="after")
    def _days_are_in_order(self) -> Self:
        if self.first and self.last and self.first > self.last:
            raise ValueError(f"first: {self.first} is after last, {self.last}")
        return self

    def hold(self, day: str | None) -> bool:
        """Does a question of this day (ISO 8601; none: it has no date) belong to them?"""
        if day is None:
            return True
        return (self.first is None or day >= str(self.first)) and (self.last is None or day <= str(self.last))


class EvalConfig(Config):
    """Suites by their names: the recipe's own held-out problems, or benchmarks (`distill.benchmarks`)."""

    suites: Distinct[str] = ("pico",)
    held_out: HeldOutSource | None = Field(None, description="the problems behind the suites `held_out` and `pico`")
    num_samples: int = Field(4, ge=1, description="samples a question; pass@1 is their mean")
    sampling: Sampling = Sampling()
    batch_size: Annotated[BatchSize, Mark.SPEED] = Field(
        "auto", description="answers in progress together; auto: by the GPU's memory; 128 on a CPU or by transformers"
    )
    engine: Literal["transformers", "native"] = Field(
        "native", description="who writes the answers of bases and students; the samples differ, not the odds"
    )
    limit: int | None = Field(None, ge=1, description="questions a suite")
    contest_dates: ContestDates = ContestDates()
    max_unverifiable: float = Field(
        0.05, ge=0, le=1, description="share of a suite's samples whose reference no rule can read; above it it stops"
    )
    roles: Distinct[Role] = Field(("teacher", "base", "direct", "distilled"), description="which models are scored")


class PushConfig(Config):
    repo: str = Field("potstill-{student}", description="repository name; {student} is filled in")
    student: str | None = Field(None, description="which student; none: the best distilled one")
    best_by: str | None = Field(
        None, description="the suite whose pass@1 says which is the best, of equals the smaller; none: the first suite"
    )
    private: bool = True


class PushTracesConfig(Config):
    """The traces as a data set of the Hub."""

    repo: str = Field("potstill-{recipe}-traces", description="repository name; {recipe} is filled in")
    private: bool = True
    include_rejected: bool = Field(False, description="every sample as a second configuration, with what dropped it")
    licence: Licence | None = Field(None, description="of the data set; none: those of its sources")
    licences: dict[str, Licence] = Field(
        default_factory=dict, description="of the sources, where they are not procedural"
    )
    language: str = "en"
    shard_mb: int = Field(500, ge=1, description="uncompressed size of a Parquet file, about")
