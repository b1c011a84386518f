"""Settings of scoring models and of pushing models and traces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill.licences import Licence
from distill.recipe.config import BatchSize, Config, Distinct, Mark
from distill.recipe.problems import HeldOutSource
from distill.recipe.teachers import ServedEngine
from distill.records import Role, Sampling

# Suites of the recipe's own held-out problems: one that is named for what it is, and that of the bundled scale.
OWN_SUITES = ("held_out", "pico")
# In front of the name of one of lm-eval's own tasks, which then is a suite too.
LM_EVAL = "lm_eval:"


class LmEvalConfig(Config):
    """How lm-eval's own tasks are asked, where lm-eval leaves it open."""

    num_fewshot: int | None = Field(None, ge=0, description="examples in a prompt; none: as the task says")
    chat_template: bool = Field(False, description="the model's own chat template around every prompt")
    fewshot_as_multiturn: bool = Field(False, description="with the chat template: every example a turn of its own")


def _by_backend(given: Any) -> Any:
    """`vllm` is short for `{backend: vllm}`."""
    return {"backend": given} if given in ("vllm", "openai") else given


# This project's own, transformers as a peer, or a server: one of ours for each model, or one that is there.
Engine = Annotated[
    Literal["native", "transformers"] | Annotated[ServedEngine, Field(discriminator="backend")],
    BeforeValidator(_by_backend),
]


class EvalConfig(Config):
    """Suites by name: the recipe's own held-out problems, benchmarks (`distill.benchmarks`), or `lm_eval:TASK`."""

    suites: Distinct[str] = ("pico",)
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
    max_unverifiable: float = Field(
        0.05, ge=0, le=1, description="share of a suite's samples whose reference no rule can read; above it it stops"
    )
    roles: Distinct[Role] = Field(("teacher", "base", "direct", "distilled"), description="which models are scored")

    @property
    def own_suites(self) -> tuple[str, ...]:
        """The suites that potstill asks and grades itself."""
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
