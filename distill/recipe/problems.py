"""Sources of the prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distill.benchmarks import BENCHMARKS, BenchmarkSplit
from distill.errors import nearest
from distill.recipe.config import Config
from distill.recipe.teachers import TeacherConfig
from distill.records import Sampling

Grader = Literal["math", "choice", "code", "judge"]
Mode = Literal["rephrased", "numbers_varied", "new"]
ASKED_PER_KEPT = 8  # questions asked for, for each that is wanted, before it is given up


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
    name: str = Field(description=f"as the suite of the same questions is called: {', '.join(BENCHMARKS)}")
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


GivenSource = Annotated[ReasoningGymSource | LocalSource | DatasetSource | BenchmarkSource, Field(discriminator="kind")]


class SynthesisedSource(Config):
    """Questions that a teacher writes after the model of others, kept where enough of its own answers agree.

    Each is asked for by one of three `modes` and one seed: the seed in other words, as MetaMath rephrases (arXiv
    2309.12284, section 3.2), which must keep the seed's answer; the seed with other numbers; a new one of its kind. The
    answer that at least `min_agreement` of `num_votes` samples give becomes the reference (self-consistency, arXiv
    2203.11171). TinyGSM (arXiv 2312.09241) brought a model of 125M parameters to 63% of GSM8K with 12 million of such
    problems.
    """

    kind: Literal["synthesised"] = "synthesised"
    name: str = Field("synthesised", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="of the source, and of its folder")
    seeds: tuple[GivenSource, ...] = Field(min_length=1, description="questions with short answers to begin from")
    count: int = Field(ge=1, description="questions to keep")
    max_asked: int | None = Field(
        None, ge=1, description=f"questions asked for at the most; none: {ASKED_PER_KEPT} for each of `count`"
    )
    modes: dict[Mode, Annotated[float, Field(ge=0)]] = Field(
        {"rephrased": 1.0, "numbers_varied": 1.0, "new": 1.0}, description="how often each is asked for; 0: never"
    )
    num_votes: int = Field(5, ge=2, le=64, description="samples that answer a question")
    min_agreement: float = Field(0.6, gt=0.5, le=1, description="share of them that must give the same answer")
    sampling: Sampling = Field(
        Sampling(temperature=1.0, top_p=0.95, max_tokens=2_048, seed=29), description="of the questions"
    )
    vote_sampling: Sampling | None = Field(
        None, description="of the answers; none: generate.sampling, so that they are samples of the question at once"
    )
    teacher: TeacherConfig | None = Field(None, description="who writes and answers; none: the recipe's teacher")

    @property
    def most_asked(self) -> int:
        return self.max_asked or ASKED_PER_KEPT * self.count

    @field_validator("modes")
    @classmethod
    def _some_mode_is_asked_for(cls, modes: dict[Mode, float]) -> dict[Mode, float]:
        if not any(modes.values()):
            raise ValueError("all are 0")
        return modes

    @model_validator(mode="after")
    def _answers_can_be_compared(self) -> Self:
        for seed in self.seeds:
            if isinstance(seed, LocalSource | DatasetSource) and seed.grader != "math":
                raise ValueError(f"seeds: answers are compared as mathematics, got seeds with the grader {seed.grader}")
        return self


def _procedural_by_default(source: Any) -> Any:
    return {"kind": "reasoning_gym", **source} if isinstance(source, dict) else source


HeldOutSource = Annotated[
    ReasoningGymSource | LocalSource, Field(discriminator="kind"), BeforeValidator(_procedural_by_default)
]
ProblemSource = Annotated[
    ReasoningGymSource | LocalSource | DatasetSource | BenchmarkSource | SynthesisedSource, Field(discriminator="kind")
]
