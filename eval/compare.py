"""Conclusions from all scores of a run: gains with paired intervals, whether larger is better, the summary file.

Reads what the stages left in a run folder and computes; `eval.report` shows. Every difference between two models is
paired over the questions that both answered (`eval.statistics.paired_difference`), because two intervals that overlap
do not mean that the difference is unclear.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.errors import DataError
from distill.manifest import read_manifest
from distill.records import ScoreCard, StageManifest
from distill.verify.audit import AuditSummary, SuspectedReference
from eval.harness import SAMPLES, SCORES, group_outcomes
from eval.statistics import Difference, paired_difference

LIKE_SIZE = 1.15  # students whose parameter counts differ by less are not a size comparison
METRIC = "pass@1"
MAX_SUSPECTS = 20  # suspected references that are shown, replaced ones first; audit.json has all
DROPPED_FIELDS = ("key", "detail", "question", "completion")  # of an example of what a filter dropped


@dataclass(frozen=True)
class Model:
    """One scored model: its cards, its sample rows, and the manifest it was scored under."""

    name: str
    cards: tuple[ScoreCard, ...]
    rows: tuple[Mapping[str, Any], ...]
    manifest: StageManifest | None

    @property
    def role(self) -> str:
        return self.cards[0].role

    @property
    def student(self) -> str:
        """`qwen2-0.4m` of `qwen2-0.4m-distilled`."""
        return self.name.removesuffix(f"-{self.role}")

    def card(self, suite: str, metric: str = METRIC) -> ScoreCard | None:
        return next((card for card in self.cards if (card.suite, card.metric) == (suite, metric)), None)

    def outcomes(self, suite: str) -> dict[str, list[bool]]:
        return group_outcomes([row for row in self.rows if row["suite"] == suite])


@dataclass(frozen=True)
class StudentRow:
    """One line of the headline table."""

    student: str
    num_parameters: int
    scores: Mapping[str, ScoreCard]  # by role
    gains: Mapping[str, Difference]  # distilled minus this role


@dataclass(frozen=True)
class SizeStep:
    """Two distilled students of neighbouring size, `larger` minus `smaller`."""

    smaller: str
    larger: str
    difference: Difference

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.difference.ci95)
        figures = f"{100 * self.difference.value:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
        if not self.difference.clear:
            return f"{self.larger} against {self.smaller}: {figures}; the difference lies within its interval"
        return f"{self.larger} {'beats' if self.difference.value > 0 else 'falls behind'} {self.smaller}: {figures}"


@dataclass(frozen=True)
class Comparison:
    """All that a report shows."""

    name: str
    suite: str
    models: tuple[Model, ...]
    students: tuple[StudentRow, ...]
    size_steps: tuple[SizeStep, ...]
    size_verdict: str
    families: tuple[str, ...]
    funnel: tuple[Mapping[str, Any], ...]
    questions: Mapping[str, Sequence[Mapping[str, Any]]]  # the funnels of questions that a teacher wrote, by source
    num_hinted: int  # examples whose traces were asked with the reference as a hint
    audit: AuditSummary | None
    stages: tuple[Mapping[str, Any], ...]
    manifests: Mapping[str, StageManifest] = field(default_factory=dict)

    @property
    def teacher(self) -> Model | None:
        return next((model for model in self.models if model.role == "teacher"), None)

    def of_role(self, role: str) -> list[Model]:
        """Models of one role, smallest first."""
        models = [model for model in self.models if model.role == role]
        return sorted(models, key=lambda model: (model.cards[0].num_parameters, model.name))


def compare_run(run_dir: Path) -> Comparison:
    """Read a run folder. Raises DataError where nothing has been scored, or where a file is not what it should be."""
    folders = sorted(path.parent for path in (run_dir / "eval").glob(f"*/{SCORES}"))
    models = tuple(read_model(folder) for folder in folders)
    if not models:
        raise DataError("holds no scores: run eval first", where=run_dir / "eval")
    suite = models[0].cards[0].suite
    students = tuple(_student_rows(models, suite))
    steps = tuple(_size_steps(models, suite))
    families = sorted({card.suite.partition("/")[2] for model in models for card in model.cards if "/" in card.suite})
    return Comparison(
        name=run_dir.name,
        suite=suite,
        models=models,
        students=students,
        size_steps=steps,
        size_verdict=size_verdict(steps),
        families=tuple(families),
        funnel=tuple(_read_funnel(run_dir / "curate" / "funnel.json")),
        questions=_read_question_funnels(run_dir / "generate"),
        num_hinted=_count(run_dir / "curate", "hinted", 0),
        audit=_read_audit(run_dir / "curate" / "audit.json"),
        stages=tuple(stage_costs(run_dir)),
        manifests=stage_manifests(run_dir),
    )


def read_model(folder: Path) -> Model:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        cards = tuple(ScoreCard.model_validate(card) for card in json.loads((folder / SCORES).read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as exc:
        raise DataError(f"not a list of score cards ({exc})", where=folder / SCORES) from exc
    try:
        rows = tuple(pq.read_table(folder / SAMPLES).to_pylist())
    except (OSError, pa.ArrowException) as exc:
        raise DataError(f"not a readable Parquet file ({exc})", where=folder / SAMPLES) from exc
    if not cards:
        raise DataError("holds no score card", where=folder / SCORES)
    return Model(folder.name, cards, rows, read_manifest(folder))


def size_verdict(steps: Sequence[SizeStep]) -> str:
    """One sentence: is larger better, as far as these questions can tell?"""
    if not steps:
        return "There are no two distilled students of different size to compare."
    clear_gain = [step for step in steps if step.difference.clear and step.difference.value > 0]
    clear_loss = [step for step in steps if step.difference.clear and step.difference.value < 0]
    if len(clear_gain) == len(steps):
        return "Larger is better at every step, and no interval of a difference reaches zero."
    parts = []
    if clear_gain:
        parts.append(f"larger is clearly better at {len(clear_gain)} of {len(steps)} steps")
    if unclear := len(steps) - len(clear_gain) - len(clear_loss):
        parts.append(f"at {unclear} the difference lies within its interval")
    if clear_loss:
        parts.append(f"at {len(clear_loss)} the larger student is clearly worse")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def summary(comparison: Comparison) -> dict[str, Any]:
    """`summary.json`: stages with their cost, models with their score of each suite, the funnel, the audit."""
    models = []
    for model in comparison.models:
        for card in model.cards:
            if "/" not in card.suite and card.metric == METRIC:
                models.append(card.model_dump(mode="json"))
    funnel = _without_examples(comparison.funnel)
    questions = {name: _without_examples(steps) for name, steps in comparison.questions.items()}
    written = {"questions": questions, "hinted": comparison.num_hinted}
    audit = None if comparison.audit is None else _audit_summary(comparison.audit)
    return {"stages": list(comparison.stages), "models": models, "funnel": funnel, **written, "audit": audit}


def stage_manifests(run_dir: Path) -> dict[str, StageManifest]:
    """Manifests of the stages before this one, `distill` being one a student."""
    found = {}
    for name in ("generate", "curate", "distill", "eval"):
        manifest = read_manifest(run_dir / name)
        if manifest is not None:
            found[name] = manifest
            for written in manifest.counts.get("synthesised", ()):
                if (nested := read_manifest(run_dir / name / "questions" / written)) is not None:
                    found[f"{name}/{written}"] = nested
        elif name == "distill":
            for path in sorted((run_dir / name).glob("*/manifest.json")):
                trained = read_manifest(path.parent)
                if trained is not None:
                    found[f"distill/{path.parent.name}"] = trained
    return found


def stage_costs(run_dir: Path) -> list[dict[str, Any]]:
    """Seconds and peak memory of each stage; students that were trained one by one count as one stage."""
    costs: dict[str, dict[str, Any]] = {}
    for name, manifest in stage_manifests(run_dir).items():
        stage = name.partition("/")[0]
        cost = costs.setdefault(stage, {"name": stage, "seconds": 0.0, "peak_rss_bytes": 0})
        cost["seconds"] = round(cost["seconds"] + manifest.seconds, 3)
        cost["peak_rss_bytes"] = max(cost["peak_rss_bytes"], manifest.peak_rss_bytes)
    return list(costs.values())


def _student_rows(models: Sequence[Model], suite: str) -> list[StudentRow]:
    by_student: dict[str, dict[str, Model]] = {}
    for model in models:
        if model.role != "teacher" and model.card(suite):
            by_student.setdefault(model.student, {})[model.role] = model
    rows = []
    for student, of_role in by_student.items():
        scores = {role: card for role, model in of_role.items() if (card := model.card(suite))}
        gains = {}
        if "distilled" in of_role:
            distilled = of_role["distilled"].outcomes(suite)
            for role in ("base", "direct"):
                if role in of_role:
                    gains[role] = paired_difference(distilled, of_role[role].outcomes(suite))
        parameters = max(card.num_parameters for card in scores.values())
        rows.append(StudentRow(student, parameters, scores, gains))
    return sorted(rows, key=lambda row: (row.num_parameters, row.student))


def _size_steps(models: Sequence[Model], suite: str) -> list[SizeStep]:
    """Neighbours in size among the distilled students of one architecture."""
    steps = []
    ladders: dict[str, list[tuple[int, Model]]] = {}
    for model in models:
        card = model.card(suite)
        if model.role == "distilled" and card:
            ladders.setdefault(card.architecture, []).append((card.num_parameters, model))
    for architecture in sorted(ladders):
        ladder = sorted(ladders[architecture], key=lambda entry: (entry[0], entry[1].name))
        for (small_count, small), (large_count, large) in pairwise(ladder):
            if large_count >= LIKE_SIZE * small_count:
                difference = paired_difference(large.outcomes(suite), small.outcomes(suite))
                steps.append(SizeStep(small.student, large.student, difference))
    return steps


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    examples = [{name: str(example[name]) for name in DROPPED_FIELDS} for example in step.get("examples", ())]
    return {"filter": str(step["filter"]), "in": int(step["in"]), "out": int(step["out"]), "examples": examples}


def _without_examples(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: step[name] for name in ("filter", "in", "out")} for step in steps]


def _count(folder: Path, name: str, default: Any) -> Any:
    """One of the counts of a stage."""
    manifest = read_manifest(folder)
    return default if manifest is None else manifest.counts.get(name, default)


def _read_question_funnels(generated: Path) -> dict[str, list[dict[str, Any]]]:
    """Of the sources that the last generation had: folders of others may still be there."""
    return {
        name: _read_funnel(generated / "questions" / name / "funnel.json")
        for name in _count(generated, "synthesised", {})
    }


def _read_funnel(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        steps = json.loads(path.read_text("utf-8"))
        return [_step(step) for step in steps]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(f"not a list of filters with counts ({exc!r})", where=path) from exc


def report_suspects(audit: AuditSummary) -> list[SuspectedReference]:
    return sorted(audit.suspected_references, key=lambda one: not one.relabelled)[:MAX_SUSPECTS]


def _audit_summary(audit: AuditSummary) -> dict[str, Any]:
    """The audit with as many suspected references as the page shows, and the number of all."""
    return {
        **audit.model_dump(mode="json"),
        "suspected_references": [one.model_dump(mode="json") for one in report_suspects(audit)],
        "num_suspected_references": len(audit.suspected_references),
        "num_relabelled_references": len(audit.relabelled),
        "num_relabelled_samples": audit.num_relabelled_samples,
    }


def _read_audit(path: Path) -> AuditSummary | None:
    if not path.exists():
        return None
    try:
        return AuditSummary.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError(f"not an audit ({exc})", where=path) from exc
