"""Under what conditions a score came about: what every card, table and report says beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from eval.scored import Model

UNKNOWN = "–"


@dataclass(frozen=True)
class Setting:
    """Who wrote a model's answers and who graded them; None where it is not known (an earlier version's run, a server).

    `template` is the hash of chat template, tokenizer and instruction.
    """

    engine: str | None
    engine_version: str | None
    dtype: str | None
    template: str | None
    graders: str | None


@dataclass(frozen=True)
class Conditions(Setting):
    """Of one model's score on one suite; `truncated` is a share of the graded samples."""

    num_questions: int
    samples_per_question: int
    truncated: float
    ungraded: int


def setting(model: Model) -> Setting:
    identity = model.identity
    versions = model.manifest.config.get("grading", {}).get("grader_versions", {}) if model.manifest else {}
    return Setting(
        engine=identity.get("backend"),
        engine_version=identity.get("backend_version"),
        dtype=_dtype(identity.get("backend"), identity.get("backend_version", "")),
        template=identity.get("template"),
        graders=", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    )


def conditions(model: Model, suite: str) -> Conditions:
    answers = model.answers[suite]
    return Conditions(
        **asdict(setting(model)),
        num_questions=len(answers.means),
        samples_per_question=answers.samples_per_question,
        truncated=answers.truncated,
        ungraded=answers.ungraded,
    )


def shown_conditions(model: Model, suite: str) -> dict[str, str]:
    """The same for a table, hashes shortened."""
    found = conditions(model, suite)
    return {
        "model": model.name,
        "suite": suite,
        "questions x samples": f"{found.num_questions:,} x {found.samples_per_question}",
        "engine": " ".join(filter(None, (found.engine, found.engine_version))) or UNKNOWN,
        "dtype": found.dtype or UNKNOWN,
        "template": (found.template or UNKNOWN)[:12],
        "graders": found.graders or UNKNOWN,
        "cut off": f"{found.truncated:.1%}",
        "ungraded": f"{found.ungraded:,}",
    }


def _dtype(engine: str | None, version: str) -> str | None:
    """The native engine's version names its precision, but for the plain one."""
    return (version.partition("-")[2] or "float32") if engine == "native" else None
