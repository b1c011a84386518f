"""The records that stages hand to each other. Frozen, validated, identified by their content.

`Problem -> Trace -> Verdict -> Example -> ScoreCard`, and a `StageManifest` beside each stage's output.
A record's id is a hash of what it says, so that equal content is the same record on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

VerdictState = Literal["correct", "wrong", "unverifiable", "truncated", "timeout", "infra_error"]
FinishReason = Literal["stop", "length"]
# "none": a text that is asked for, not a question; it is asked without the instruction on how to answer one.
Grader = Literal["reasoning_gym", "math", "choice", "code", "judge", "none"]
Role = Literal["teacher", "base", "direct", "distilled"]
# Samples from this index on were asked with the reference as a hint, so that more samples without never meet them.
FIRST_HINTED = 1_000_000


def content_id(content: Any, *, digits: int = 32) -> str:
    """Hash of a JSON value: SHA-256 over its canonical form (sorted keys, no spaces), first `digits` hex digits."""
    return _digits(_canonical(content), digits)


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digits(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Record):
    """One question with what is needed to grade an answer.

    `source` names the family or data set, `metadata` is what its grader asks for (for reasoning-gym the entry's own
    metadata, `choices` for multiple choice, the tests for code; `votes` where the reference is the majority's answer).
    """

    prompt: str = Field(min_length=1)
    answer: str | None
    grader: Grader
    source: str
    metadata: dict[str, Any] = Field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Identity of the question: its text and the grader's reference (code: its tests), not where it came from.

        A reference that was voted is no part of it: it is made of the question's own samples, which keep their keys.
        """
        tests = [self.metadata] if self.grader == "code" else []
        answer = None if "votes" in self.metadata else self.answer
        return content_id([self.prompt, answer, self.grader, *tests])


class Sampling(Record):
    """Settings of drawing a completion and keeping it. `max_tokens` counts new tokens; `temperature` 0 is greedy."""

    temperature: float = Field(0.6, ge=0, le=5)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(32_768, ge=1)
    seed: int = Field(17, ge=0)
    top_logprobs: int = Field(0, ge=0, le=20, description="likeliest tokens kept at every position; 0: none")
    max_thinking_tokens: int | None = Field(
        None, ge=1, description="after this many tokens without </think> it is forced and the answer begins"
    )

    @model_validator(mode="after")
    def _an_answer_has_room(self) -> Sampling:
        if self.max_thinking_tokens is not None and self.max_thinking_tokens >= self.max_tokens:
            raise ValueError(f"max_thinking_tokens: must be below max_tokens ({self.max_tokens})")
        return self

    def content(self) -> dict[str, Any]:
        """The part that goes into a sample's key: every field, but a feature that is off is left out.

        So a ledger that was written before a feature existed still answers. "Off" is a fixed value, not the field's
        default: a default that moves one day must not make two different samplings equal.
        """
        off = {"top_logprobs": 0, "max_thinking_tokens": None}
        return {name: value for name, value in self.model_dump().items() if name not in off or value != off[name]}


class TeacherIdentity(Record):
    """All that can change what a teacher writes, apart from the problem and the sampling."""

    name: str
    weights: str = Field(description="hash of the weight files, or the served model's name and revision")
    template: str = Field(description="hash of chat template, tokenizer and instruction")
    backend: str
    backend_version: str

    def asked_with(self, settings: Sequence[Any]) -> TeacherIdentity:
        """The same teacher, asked with these settings (an instruction, say): part of `template` where there are any."""
        return self.model_copy(update={"template": content_id([self.template, *settings])}) if settings else self


class SampleKeys:
    """Keys of many samples of one teacher and sampling: `content_id([problem, teacher, sampling, sample_index])`."""

    def __init__(self, teacher: TeacherIdentity, sampling: Sampling) -> None:
        self._middle = _canonical([teacher.model_dump(), sampling.content()])[1:-1]

    def of(self, problem_id: str, sample_index: int) -> str:
        return _digits(f'["{problem_id}",{self._middle},{sample_index}]', 32)


class TraceRequest(Record):
    problem: Problem
    sample_index: int = Field(ge=0)

    def key(self, teacher: TeacherIdentity, sampling: Sampling) -> str:
        """The sample's key: changes with anything that can change the sample, and with nothing else."""
        return SampleKeys(teacher, sampling).of(self.problem.id, self.sample_index)

    def seed(self, sampling: Sampling) -> int:
        """Seed of this one sample: distinct for every problem and index, equal on every machine."""
        return int(content_id([sampling.seed, self.problem.id, self.sample_index], digits=15), 16)


class Completion(Record):
    """A teacher's text for one request; `text` begins with the reasoning's opening tag where the model has one.

    `num_tokens` counts forced tokens too. `logprobs` is a packed `distill.logprobs.TokenLogprobs`, or None.
    """

    request: TraceRequest
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    logprobs: str | None = None


class Trace(Record):
    """An accepted sample as the ledger keeps it."""

    key: str
    problem_id: str
    sample_index: int
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    teacher: str
    logprobs: str | None = Field(None, description="compact JSON, where the teacher was asked for them")

    @property
    def hinted(self) -> bool:
        """Was the teacher told the reference?"""
        return self.sample_index >= FIRST_HINTED

    @classmethod
    def of(cls, completion: Completion, *, key: str, teacher: str, problem_id: str | None = None) -> Trace:
        """A completion as it is kept; `teacher` is its identity's name.

        `problem_id` is that of the problem it stands for, where another was asked.
        """
        kept = ("text", "finish_reason", "num_prompt_tokens", "num_tokens", "logprobs")
        return cls(
            key=key,
            problem_id=problem_id or completion.request.problem.id,
            sample_index=completion.request.sample_index,
            teacher=teacher,
            **{name: getattr(completion, name) for name in kept},
        )


class Verdict(Record):
    """The grading of one answer. A failure of ours (`timeout`, `infra_error`) is never `wrong`."""

    state: VerdictState
    extracted: str | None = None
    detail: str = ""
    relabelled: bool = Field(False, description="correct by the majority of the samples, against the given reference")

    @property
    def correct(self) -> bool:
        return self.state == "correct"


class Message(Record):
    """One turn of a conversation that is learned from. `content` may be given as text parts, as chat APIs have it."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, content: Any) -> Any:
        if content is None:
            raise ValueError("is null: a turn that is learned from must say something")
        if not isinstance(content, (list, tuple)):
            return content
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("has parts that are no text")
        return "".join(str(part.get("text") or "") for part in content)


class Example(Record):
    """One training example: a question and the completion that a student shall learn, and where it came from.

    `history` are the turns of the conversation before the question.
    """

    question: str
    completion: str
    problem_id: str
    trace_key: str | None
    source: str
    relabelled: bool = Field(False, description="its reference was suspected and replaced by the majority's answer")
    hinted: bool = Field(False, description="the teacher was told the reference, and found a way to it")
    history: tuple[Message, ...] = ()

    @cached_property
    def id(self) -> str:
        before = [[turn.model_dump() for turn in self.history]] if self.history else []
        return content_id([self.question, self.completion, *before])


class StageManifest(Record):
    """Written last: its presence is the stage's completion. Hashes are SHA-256; outputs are relative to the folder."""

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    outputs: dict[str, str]
    versions: dict[str, str]
    counts: dict[str, Any]
    seconds: float
    peak_rss_bytes: int
    device: str = Field("", description="the GPUs of the machine that it ran on, else its processor")


class ScoreCard(Record):
    """One model on one suite (or one family of it, `suite` = `pico/gcd`).

    `stderr` and `ci95` are None where a metric of lm-eval's has no standard error.
    """

    name: str
    role: Role
    architecture: str
    num_parameters: int
    num_active_parameters: int
    suite: str
    metric: str
    value: float
    stderr: float | None
    ci95: tuple[float, float] | None
    num_questions: int
    num_samples: int
