"""Settings of scoring models and of pushing models and traces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from distill.benchmarks import BENCHMARKS
from distill.licences import Licence
from distill.recipe.config import BatchSize, Config, Distinct, Mark
from distill.recipe.problems import GivenSource, HeldOutSource, ReasoningGymSource
from distill.recipe.teachers import ServedEngine, TeacherConfig
from distill.records import Role, Sampling

# Suites of the recipe's own held-out problems: one that is named for what it is, and that of the bundled scale.
OWN_SUITES = ("held_out", "pico")
# In front of the name of one of lm-eval's own tasks, which then is a suite too.
LM_EVAL = "lm_eval:"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # of a suite: the name of its file, too


class ComparingJudge(Config):
    """A model that says, at temperature 0, which of two answers serves better (`eval.side_by_side`)."""

    teacher: TeacherConfig = Field(description="any backend; its identity is part of the verdict's key")
    max_tokens: int = Field(8_192, ge=16, description="of one verdict, reasoning included")


def _written(day: Any) -> Any:
    """YAML reads 2024-08-01 as a date, unless it is quoted."""
    return day.isoformat() if type(day) is date else day


def _a_day(day: str) -> str:
    try:
        if len(day) == len("2024-08-01"):
            return date.fromisoformat(day).isoformat()
    except ValueError:
        pass
    raise ValueError(f"must be a day, as in 2024-08-01, got {day!r}")


Day = Annotated[str, BeforeValidator(_written), AfterValidator(_a_day)]


class ContestDates(Config):
    """Which questions of a suite that dates them (LiveCodeBench) are asked: those of contests between two days.

    A model cannot have learned a question that was published after its training data were gathered. R1's own window is
    2024-08-01 to 2025-01-31 (arXiv 2501.12948, section 3).
    """

    first: Day | None = Field(None, description="the first day; none: from the beginning")
    last: Day | None = Field(None, description="the last day, inclusive; none: to the end")

    @model_validator(mode="after")
    def _days_are_in_order(self) -> Self:
        if self.first and self.last and self.first > self.last:
            raise ValueError(f"first: {self.first} is after last, {self.last}")
        return self

    def hold(self, day: str | None) -> bool:
        """Does a question of this day (ISO 8601; none: it has no date) belong to them?"""
        if day is None:
            return True
        return (self.first is None or day >= self.first) and (self.last is None or day <= self.last)


def names_and_problems(tree: Any) -> Any:
    """Settings of `eval` with names alone in `suites` and problems in `own`, however they were given.

    Raises ValueError for a suite that is a mapping of anything else.
    """
    if not isinstance(tree, Mapping) or not isinstance(tree.get("suites"), list | tuple):
        return tree
    if not any(isinstance(suite, Mapping) for suite in tree["suites"]) or not isinstance(tree.get("own", {}), Mapping):
        return tree
    names, own = [], dict(tree.get("own", {}))
    for number, suite in enumerate(tree["suites"]):
        if isinstance(suite, Mapping):
            if set(suite) != {"name", "problems"} or not isinstance(suite["name"], str):
                raise ValueError(f"suites.{number}: a suite of yours has `name` and `problems`, and nothing else")
            own.setdefault(suite["name"], suite["problems"])
        names.append(suite["name"] if isinstance(suite, Mapping) else suite)
    return {**tree, "suites": names, "own": own}


class LmEvalConfig(Config):
    """How lm-eval's own tasks are asked, where lm-eval leaves it open."""

    num_fewshot: int | None = Field(None, ge=0, description="examples in a prompt; none: as the task says")
    chat_template: bool = Field(False, description="the model's own chat template around every prompt")
    fewshot_as_multiturn: bool = Field(True, description="with the chat template: every example a turn of its own")


def _by_backend(given: Any) -> Any:
    """`vllm` is short for `{backend: vllm}`."""
    return {"backend": given} if given in ("vllm", "openai") else given


# This project's own, transformers as a peer, or a server: one of ours for each model, or one that is there.
Engine = Annotated[
    Literal["native", "transformers"] | Annotated[ServedEngine, Field(discriminator="backend")],
    BeforeValidator(_by_backend),
]


class EvalConfig(Config):
    """Suites by name: the recipe's own held-out problems, benchmarks (`distill.benchmarks`), `lm_eval:TASK`, or yours.

    The latter may stand in the list itself: `suites: [gsm8k, {name: mine, problems: {kind: local, path: ...}}]`.
    """

    suites: Distinct[str] = ("pico",)
    own: dict[str, GivenSource] = Field(
        default_factory=dict, description="problems of suites of yours, by name; all of these are asked"
    )
    held_out: HeldOutSource | None = Field(None, description="the problems behind the suites `held_out` and `pico`")
    num_samples: int = Field(4, ge=1, description="samples a question; pass@1 is their mean")
    sampling: Sampling = Sampling()
    batch_size: Annotated[BatchSize, Mark.SPEED] = Field(
        "auto", description="answers in progress together; auto: by the GPU's memory; 128 on a CPU or by transformers"
    )
    engine: Engine = Field(
        "native", description="who writes the answers of bases and students; the samples differ, not the odds"
    )
    lm_eval: LmEvalConfig = LmEvalConfig()
    limit: int | None = Field(None, ge=1, description="questions a suite")
    contest_dates: ContestDates = ContestDates()
    max_unverifiable: float = Field(
        0.05, ge=0, le=1, description="share of a suite's samples whose reference no rule can read; above it it stops"
    )
    price_per_hour: Annotated[float | None, Mark.PRICE] = Field(
        None, ge=0, description="of the machine that scores; the report then says what 1,000 answers cost"
    )
    roles: Distinct[Role] = Field(("teacher", "base", "direct", "distilled"), description="which models are scored")
    judge: ComparingJudge | None = Field(
        None, description="holds students' answers beside the teacher's, in suites of yours whose grader is `judge`"
    )

    @property
    def compared(self) -> tuple[str, ...]:
        """Suites without references, whose answers are compared and not graded."""
        return tuple(name for name in self.suites if getattr(self.own.get(name), "grader", None) == "judge")

    @property
    def graded(self) -> tuple[str, ...]:
        """Those whose answers potstill grades."""
        return tuple(name for name in self.our_suites if name not in self.compared)

    @property
    def asked_of_all(self) -> dict[str, Any]:
        """The settings that say which questions evaluation asks, and training must not."""
        asked = self.model_dump(mode="json", include={"suites", "held_out", "own"})
        return asked if self.own else {name: value for name, value in asked.items() if name != "own"}

    @model_validator(mode="before")
    @classmethod
    def _problems_in_the_list(cls, tree: Any) -> Any:
        return names_and_problems(tree)

    @model_validator(mode="after")
    def _suites_of_yours_have_names_of_their_own(self) -> Self:
        for name, source in self.own.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"own: a suite's name must be of the form {NAME.pattern}, got {name!r}")
            if name in (*OWN_SUITES, *BENCHMARKS):
                raise ValueError(f"own.{name}: is a suite that there is already; give yours another name")
            if name not in self.suites:
                raise ValueError(f"own.{name}: is not among suites")
            if isinstance(source, ReasoningGymSource) and source.split != "held_out":
                raise ValueError(f"own.{name}.split: must be 'held_out', so that no student has learned its questions")
        return self

    @model_validator(mode="after")
    def _answers_without_reference_have_a_judge(self) -> Self:
        if not (compared := self.compared):
            return self
        if self.judge is None:
            raise ValueError(f"judge: the suite {compared[0]!r} has no reference, and needs one (judge.teacher)")
        if "teacher" not in self.roles or len(self.roles) == 1:
            raise ValueError(f"roles: {compared[0]!r} holds students beside the teacher, and needs both")
        if not self.graded:
            raise ValueError(f"suites: beside {compared[0]!r} one must have references, by which models are ranked")
        return self

    def stated(self, name: Literal["num_samples", "sampling"]) -> Any:
        """The setting where it holds: as the recipe states it, or for lack of a protocol; None: as a suite's task says.

        The recipe's own problems have no protocol, benchmarks have one.
        """
        without_protocol = set(self.our_suites) <= {*OWN_SUITES, *self.own}
        return getattr(self, name) if without_protocol or name in self.model_fields_set else None

    @property
    def our_suites(self) -> tuple[str, ...]:
        """The suites that potstill asks itself."""
        return tuple(suite for suite in self.suites if not suite.startswith(LM_EVAL))

    @property
    def lm_eval_tasks(self) -> tuple[str, ...]:
        """lm-eval's own tasks among the suites, by lm-eval's names."""
        return tuple(suite.removeprefix(LM_EVAL) for suite in self.suites if suite.startswith(LM_EVAL))

    @model_validator(mode="after")
    def _a_served_engine_can_do_it(self) -> EvalConfig:
        if isinstance(self.engine, ServedEngine) and self.sampling.max_thinking_tokens is not None:
            raise ValueError("sampling.max_thinking_tokens: is for the native engine")
        return self

    @model_validator(mode="after")
    def _tasks_of_lm_eval_can_be_asked(self) -> EvalConfig:
        if self.lm_eval_tasks and self.engine == "transformers":
            raise ValueError("engine: transformers does not score texts for lm-eval's tasks; native does")
        return self


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
