"""A whole run: the sections of a recipe file."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from distill.errors import nearest
from distill.recipe.config import Config
from distill.recipe.curation import CurateConfig, VerifyConfig
from distill.recipe.instruction import UNINSTRUCTED, Instruction
from distill.recipe.limits import ReadLimits
from distill.recipe.problems import BenchmarkSource, LocalSource, ProblemSource, SynthesisedSource
from distill.recipe.results import OWN_SUITES, EvalConfig, PushConfig, PushTracesConfig
from distill.recipe.students import DistillConfig
from distill.recipe.teachers import GenerateConfig, ServedTeacher, TeacherConfig


class Recipe(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    problems: tuple[ProblemSource, ...] = Field(min_length=1)
    bench_data: str | None = Field(
        None, description="folder of benchmark files, for problems and suites; else POTSTILL_BENCH_DATA, else the Hub"
    )
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
    def deciding_suite(self) -> str:
        """The suite whose pass@1 says which student is the best."""
        return self.push.best_by or (*self.eval.graded, *self.eval.suites)[0]

    @model_validator(mode="after")
    def _the_best_is_found_on_a_suite_that_is_scored(self) -> Recipe:
        suite, suites = self.push.best_by, self.eval.graded
        if suite is not None and suite not in suites:
            raise ValueError(f"push.best_by: {suite!r} is not among eval.suites; {nearest(suite, suites)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _bench_data_is_for_all(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("eval"), dict) and "bench_data" in tree["eval"]:
            raise ValueError("eval.bench_data: is `bench_data` at the top of the recipe, for suites and problems alike")
        return tree

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
    def _no_suite_is_learned(self) -> Recipe:
        for number, source in enumerate(self.problems):
            if isinstance(source, BenchmarkSource) and source.split == "test" and source.name in self.eval.suites:
                message = f"the suite {source.name!r} asks the questions of its test split"
                raise ValueError(f"problems.{number}.split: {message}, which no student may learn")
        return self

    @model_validator(mode="after")
    def _who_is_scored_by_lm_eval_has_tokens(self) -> Recipe:
        if self.eval.lm_eval_tasks and "teacher" in self.eval.roles and isinstance(self.teacher, ServedTeacher):
            raise ValueError(
                f"eval.roles: lm-eval's tasks need a model's tokens, which a {self.teacher.backend} teacher does not "
                "tell; score the other roles"
            )
        return self

    @model_validator(mode="after")
    def _a_role_has_a_model(self) -> Recipe:
        roles = self.eval.roles
        methods = {method for choice in self.distill.choices for method in choice.methods}
        if not {"teacher", "base", *methods} & set(roles):
            raise ValueError(f"eval.roles: distill.methods makes no {' and no '.join(roles)} student: nothing to score")
        return self
