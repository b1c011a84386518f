"""Settings of grading and curation: how traces are graded, and which of them become examples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from distill.errors import nearest
from distill.recipe.config import Config
from distill.recipe.teachers import TeacherConfig


class Difficulty(Config):
    """Problems by the share of their samples that are correct; both bounds are inclusive."""

    min_pass_rate: float = Field(0.0, ge=0, le=1)
    max_pass_rate: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Difficulty:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}")
        return self


class NearDuplicates(Config):
    """Texts whose sets of shingles overlap: MinHash proposes pairs, the exact Jaccard similarity decides."""

    of: Literal["questions", "completions", "both"] = "questions"
    threshold: float = Field(0.8, ge=0.3, le=1, description="Jaccard similarity from which one of two texts goes")
    shingle_words: int = Field(5, ge=1, le=20, description="words and signs a shingle")
    num_perm: int = Field(128, ge=16, le=1024, description="numbers a signature; more miss fewer pairs")


class BestOfN(Config):
    """The shortest or longest of each problem's correct samples."""

    keep: int = Field(1, ge=1)
    by: Literal["shortest", "longest"] = "shortest"


class Mix(Config):
    """Shares of the sources among the examples: reached by leaving out, never by repeating."""

    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(description="a weight for every source; 0 leaves it out")
    num_examples: int | None = Field(None, ge=1, description="examples in all; none: what the scarcest source allows")

    @model_validator(mode="after")
    def _something_is_left(self) -> Mix:
        if not any(self.shares.values()):
            raise ValueError("shares: all are 0")
        return self


class CurateConfig(Config):
    """Filters in the order in which they run, each a switch whose drops the funnel counts; the form of what is left."""

    correct_only: bool = True
    complete_reasoning: bool = Field(
        True,
        description="drop traces without a closed <think> block (where the teacher's are tagged) and a final answer",
    )
    max_tokens: int | None = Field(None, ge=1, description="drop longer traces (teacher tokens)")
    language: str | None = Field(None, description="drop traces that are not in this language (ISO 639-1)")
    min_language_share: float = Field(0.9, gt=0, le=1, description="language: share of the words that must be in it")
    max_repetition: float | None = Field(0.5, ge=0, le=1, description="share of lines that repeat an earlier line")
    drop_loops: bool = Field(True, description="drop traces that end in a loop, or are mostly one")
    decontaminate: bool = Field(True, description="drop examples whose question occurs in an evaluation suite")
    min_containment: float | None = Field(
        0.3, gt=0, le=1, description="decontaminate: share of an evaluation question's 8-word runs; none: no such test"
    )
    difficulty: Difficulty | None = Field(None, description="keep problems that are solved this often")
    deduplicate: bool = True
    near_duplicates: NearDuplicates | None = Field(None, description="drop questions or completions nearly the same")
    best_of_n: BestOfN | None = Field(None, description="keep the shortest or longest correct samples of a problem")
    max_per_problem: int | None = Field(None, ge=1)
    mix: Mix | None = Field(None, description="bring the sources to these shares")
    instruction: Literal["drop", "keep"] = Field(
        "drop",
        description="whether students learn questions with the teacher's system prompt and prompt suffix",
    )

    @field_validator("language")
    @classmethod
    def _language_is_known(cls, language: str | None) -> str | None:
        from distill.verify.language import LANGUAGES

        if language is not None and language not in LANGUAGES:
            raise ValueError(f"unknown language {language!r}; {nearest(language, LANGUAGES)}")
        return language


class CodeLimits(Config):
    """Limits of a program that is graded, for each test with standard input or for all function tests together."""

    timeout_s: float = Field(10.0, gt=0, description="of processor time; by the clock half as much again")
    memory_mib: int = Field(1_024, ge=64)
    output_mib: int = Field(4, ge=1)
    num_threads: int = Field(16, ge=1)


class JudgeConfig(Config):
    """A model that decides, at temperature 0, whether a final answer says the same as the reference."""

    teacher: TeacherConfig = Field(description="any backend; its identity is part of the verdict's key")
    num_votes: int = Field(1, ge=1, le=15, description="reference and answer change places from one to the next")
    max_tokens: int = Field(8_192, ge=16, description="of one vote, reasoning included")
    on_unverifiable: bool = Field(False, description="also judge what the rules cannot decide, not `judge` alone")


class VerifyConfig(Config):
    num_workers: int = Field(2, ge=1)
    timeout_s: float = Field(10.0, gt=0, description="per answer; its grader is killed after it")
    memory_mib: int = Field(1_024, ge=128, description="that grading one answer may take beside the graders' own")
    code: CodeLimits = CodeLimits()
    judge: JudgeConfig | None = Field(None, description="none: problems whose grader is `judge` stay unverifiable")
    relabel: Literal["never", "majority"] = Field(
        "never",
        description="take the majority's answer for a reference that is suspected; never of procedural problems",
    )
    suspect_min_samples: int = Field(4, ge=2, description="graded answers, none correct, before it is suspected")
    suspect_min_share: float = Field(0.75, gt=0.5, le=1, description="of these answers that must be the same")
