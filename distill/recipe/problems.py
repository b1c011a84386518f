"""Sources of the prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distill.benchmarks import BENCHMARKS, BenchmarkSplit
from distill.errors import nearest
from distill.recipe.config import Config

Grader = Literal["math", "choice", "code", "judge"]


class ReasoningGymSource(Config):
    """Procedural problems.

    `families` is a problem-set file (`distill/problems/*.yaml`) or a mapping family -> parameters. `split` decides
    which part of the world the problems come from: a problem's own hash puts it in `train` or `held_out`, so that the
    two never meet whatever the seeds are.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    families: str | dict[str, dict[str, Any]]
    count: int = Field(ge=1, description="problems in all, spread evenly over the families")
    seed: int = Field(1, ge=0)
    split: Literal["train", "held_out"] = "train"


class LocalSource(Config):
    """JSON Lines or Parquet on this machine.

    With `split`, one file is both sides of an evaluation: a question's own hash puts it in `train` or `held_out`, as it
    does with procedural ones.
    """

    kind: Literal["local"] = "local"
    path: str
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    choices_field: str | None = None
    grader: Grader = "math"
    tests_field: str | None = Field(None, description="for programs: test code, assertions, or inputs with outputs")
    setup_field: str | None = Field(None, description="for programs: code that the tests need to have run")
    entry_point_field: str | None = Field(None, description="for programs: the function that check(candidate) is given")
    split: Literal["all", "train", "held_out"] = Field("all", description="held_out: one question in eight")
    limit: int | None = Field(None, ge=1, description="questions at the most, of the split")

    @model_validator(mode="after")
    def _programs_have_tests(self) -> Self:
        if (self.grader == "code") != (self.tests_field is not None):
            raise ValueError("tests_field: goes with grader 'code', and with no other")
        return self


class DatasetSource(Config):
    """A data set of the Hugging Face Hub, read with `datasets`."""

    kind: Literal["dataset"] = "dataset"
    repo: str
    revision: str = "main"
    config: str | None = None
    split: str = "train"
    prompt_field: str = "problem"
    answer_field: str = "answer"
    choices_field: str | None = None
    grader: Grader = "math"
    tests_field: str | None = Field(None, description="for programs: test code, assertions, or inputs with outputs")
    setup_field: str | None = Field(None, description="for programs: code that the tests need to have run")
    entry_point_field: str | None = Field(None, description="for programs: the function that check(candidate) is given")
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _programs_have_tests(self) -> Self:
        if (self.grader == "code") != (self.tests_field is not None):
            raise ValueError("tests_field: goes with grader 'code', and with no other")
        return self


class BenchmarkSource(Config):
    """Questions of a known benchmark: from the folder of benchmark files where one is named, else from the Hub."""

    kind: Literal["benchmark"] = "benchmark"
    name: str = Field(description="as the suite of the same questions is called: gsm8k, math500, aime24, aime25")
    split: BenchmarkSplit = "train"
    limit: int | None = Field(None, ge=1, description="questions at the most")

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark {name!r}; {nearest(name, BENCHMARKS)}")
        return name

    @model_validator(mode="after")
    def _split_is_there(self) -> Self:
        if self.split not in (splits := BENCHMARKS[self.name].tables):
            raise ValueError(f"split: {self.name} has {' and '.join(splits)} alone, got {self.split!r}")
        return self


def _procedural_by_default(source: Any) -> Any:
    return {"kind": "reasoning_gym", **source} if isinstance(source, dict) else source


HeldOutSource = Annotated[
    ReasoningGymSource | LocalSource, Field(discriminator="kind"), BeforeValidator(_procedural_by_default)
]
ProblemSource = Annotated[
    ReasoningGymSource | LocalSource | DatasetSource | BenchmarkSource, Field(discriminator="kind")
]
