"""Settings of scoring models and of pushing models and traces."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.licences import Licence
from distill.recipe.config import BatchSize, Config, Distinct, Mark
from distill.recipe.problems import HeldOutSource
from distill.records import Role, Sampling

# Suites of the recipe's own held-out problems: one that is named for what it is, and that of the bundled scale.
OWN_SUITES = ("held_out", "pico")


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
    max_unverifiable: float = Field(
        0.05, ge=0, le=1, description="share of a suite's samples whose reference no rule can read; above it it stops"
    )
    price_per_hour: Annotated[float | None, Mark.PRICE] = Field(
        None, ge=0, description="of the machine that scores; the report then says what 1,000 answers cost"
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
