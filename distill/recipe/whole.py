"""A whole run: the sections of a recipe file."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill.recipe.config import Config
from distill.recipe.curation import CurateConfig, VerifyConfig
from distill.recipe.instruction import UNINSTRUCTED, Instruction
from distill.recipe.limits import ReadLimits
from distill.recipe.problems import LocalSource, ProblemSource, SynthesisedSource
from distill.recipe.results import OWN_SUITES, EvalConfig, PushConfig, PushTracesConfig
from distill.recipe.students import DistillConfig
from distill.recipe.teachers import GenerateConfig, TeacherConfig


class Recipe(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    problems: tuple[ProblemSource, ...] = Field(min_length=1)
    limits: ReadLimits = ReadLimits()
    teacher: TeacherConfig
    generate: GenerateConfig = GenerateConfig()
    verify: VerifyConfig = VerifyConfig()
    curate: CurateConfig = CurateConfig()
    distill: DistillConfig
    eval: EvalConfig = EvalConfig()
    push: PushConfig = PushConfig()
    push_traces: PushTracesConfig = PushTracesConfig()

    @property
    def learned_instruction(self) -> Instruction:
        """The words in which students learn a question, and in which they and their bases are asked."""
        return self.teacher.instruction if self.curate.instruction == "keep" else UNINSTRUCTED

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All that write, by their names in messages: the recipe's, and those that synthesised sources have."""
        own = {f"teacher of {source.name}": source.teacher for source in self.synthesised if source.teacher}
        return {"teacher": self.teacher, **own}

    @property
    def synthesised(self) -> tuple[SynthesisedSource, ...]:
        return tuple(source for source in self.problems if isinstance(source, SynthesisedSource))

    @model_validator(mode="after")
    def _synthesised_sources_are_apart(self) -> Recipe:
        names = [source.name for source in self.synthesised]
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(f"problems: two synthesised sources are called {twice[0]!r}; give one another name")
        if names and self.generate.part is not None:
            raise ValueError(
                "generate.part: questions are synthesised on one machine; run it there without parts, and name the "
                f"problems.parquet in generate/questions/{names[0]} as a local source on all of them"
            )
        return self

    @model_validator(mode="after")
    def _plain_reasoning_has_no_budget(self) -> Recipe:
        if self.teacher.reasoning == "plain" and self.generate.sampling.max_thinking_tokens is not None:
            raise ValueError(
                "generate.sampling.max_thinking_tokens: needs a teacher whose reasoning is tagged, not plain"
            )
        return self

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> Recipe:
        held_out = self.eval.held_out
        if held_out is None and (own := [suite for suite in self.eval.suites if suite in OWN_SUITES]):
            raise ValueError(f"eval.held_out: the suite {own[0]!r} needs its problems")
        separate = isinstance(held_out, LocalSource) and held_out.split == "all"  # a file for this alone
        if held_out is not None and held_out.split != "held_out" and not separate:
            raise ValueError("eval.held_out.split: must be 'held_out'")
        return self

    @model_validator(mode="after")
    def _a_role_has_a_model(self) -> Recipe:
        roles = self.eval.roles
        if not {"teacher", "base", *self.distill.methods} & set(roles):
            raise ValueError(f"eval.roles: distill.methods makes no {' and no '.join(roles)} student: nothing to score")
        return self
