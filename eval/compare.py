"""Conclusions from all scores of a run, suite by suite: gains with paired intervals, and whether larger is better.

Reads what the stages left in a run folder and computes; `eval.summary` and `eval.report` show. Every difference between
two models is paired over the questions that both answered (`eval.statistics.paired_difference`), because two intervals
that overlap do not mean that the difference is unclear. Its p-value is adjusted (Holm) among all gains of the run,
whatever student, rival and suite, or among all its size steps: who looks at twenty comparisons finds one by luck.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.manifest import read_manifest
from distill.progress import Progress, silent
from distill.records import ScoreCard, StageManifest
from distill.verify.audit import AuditSummary
from eval.bootstrap import bootstrap_interval
from eval.contamination import Contamination
from eval.harness import SCORES
from eval.retained import read_retention
from eval.scored import METRIC, Model, read_model
from eval.statistics import Difference, holm, paired_difference
from eval.training_curves import Curve, read_curves

LIKE_SIZE = 1.15  # students whose parameter counts differ by less are not a size comparison
DROPPED_FIELDS = ("key", "detail", "question", "completion")  # of an example of what a filter dropped
ROLES = ("teacher", "base", "direct", "distilled")


@dataclass(frozen=True)
class StudentRow:
    """One student on one suite: its scores by role, and what it gained: distilled minus the role named."""

    student: str
    num_parameters: int
    scores: Mapping[str, ScoreCard]
    gained: Mapping[str, Difference]


@dataclass(frozen=True)
class SizeStep:
    """Two distilled students of neighbouring size, `larger` minus `smaller`."""

    smaller: str
    larger: str
    difference: Difference
    one_architecture: bool = True

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.difference.ci95)
        figures = f"{100 * self.difference.value:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
        smaller = self.smaller if self.one_architecture else f"{self.smaller} (another architecture)"
        if self.difference.holds_zero:
            return f"{self.larger} against {smaller}: {figures}; the difference lies within its interval"
        figures += f", p {p_text(self.difference.adjusted_p)} of all steps together"
        if not self.difference.clear:
            return f"{self.larger} against {smaller}: {figures}, which is not clear"
        return f"{self.larger} {'beats' if self.difference.value > 0 else 'falls behind'} {smaller}: {figures}"


@dataclass(frozen=True)
class SuiteComparison:
    """All models on one suite. `models` are in the order of `Comparison.models`, those that were scored on it."""

    name: str
    models: tuple[Model, ...]
    students: tuple[StudentRow, ...]
    size_steps: tuple[SizeStep, ...]
    families: tuple[str, ...]

    @property
    def teacher(self) -> ScoreCard | None:
        return next((model.card(self.name) for model in self.models if model.role == "teacher"), None)

    @property
    def size_verdict(self) -> str:
        return size_verdict(self.size_steps)

    @property
    def differences(self) -> list[Difference]:
        """Every gain and size step of the suite."""
        gains = [gain for row in self.students for gain in row.gained.values()]
        return [*gains, *(step.difference for step in self.size_steps)]

    def of_role(self, role: str) -> list[Model]:
        """Models of one role, smallest first."""
        return [model for model in self.models if model.role == role]


@dataclass(frozen=True)
class Comparison:
    """All that a report shows. `models` are the teacher, then the students by size, each from base to distilled."""

    name: str
    models: tuple[Model, ...]
    suites: tuple[SuiteComparison, ...]
    deciding_suite: str
    funnel: tuple[Mapping[str, Any], ...]
    questions: Mapping[str, Sequence[Mapping[str, Any]]]  # the funnels of questions that a teacher wrote, by source
    num_hinted: int  # examples whose traces were asked with the reference as a hint
    audit: AuditSummary | None
    stages: tuple[Mapping[str, Any], ...]
    retention: tuple[Mapping[str, Any], ...] = ()  # of suites without references: `eval.retained`
    manifests: Mapping[str, StageManifest] = field(default_factory=dict)
    contamination: Contamination | None = None  # None: there is no training set to look through
    curves: tuple[Curve, ...] = ()
    price_per_hour: float | None = None  # of the machine that scored, in any currency
    runs: Mapping[str, Comparison] = field(default_factory=dict)  # by name, where several are compared

    @cached_property
    def best(self) -> ScoreCard | None:
        """The best distilled student's score on the deciding suite."""
        return best_student((card for model in self.models for card in model.cards), self.deciding_suite)

    @property
    def deciding(self) -> SuiteComparison:
        """The suite that decides, or the first one where no model was scored on it."""
        return next((suite for suite in self.suites if suite.name == self.deciding_suite), self.suites[0])

    @property
    def students(self) -> list[str]:
        """Students by size."""
        return list(dict.fromkeys(model.student for model in self.models if model.role != "teacher"))


def best_student(cards: Iterable[ScoreCard], suite: str) -> ScoreCard | None:
    """The highest pass@1 of a distilled student on one suite; of equals the smaller student's."""
    of_suite = [card for card in cards if (card.role, card.suite, card.metric) == ("distilled", suite, METRIC)]
    return max(of_suite, key=lambda card: (card.value, -card.num_parameters), default=None)


def compare_run(run_dir: Path, deciding_suite: str | None = None, progress: Progress | None = None) -> Comparison:
    """Read a run folder. `deciding_suite` says which student is the best; none: the first that was scored.

    Raises DataError where nothing has been scored, or where a file is not what it should be.
    """
    folders = sorted(path.parent for path in (run_dir / "eval").glob(f"*/{SCORES}"))
    if not folders:
        raise DataError("holds no scores: run eval first", where=run_dir / "eval")
    read = []
    with (progress or silent()).task("read scores", len(folders), unit="models") as task:
        for folder in folders:
            read.append(read_model(folder))
            task.advance(1)
    models = by_size(read)
    names = list(dict.fromkeys(suite for model in read for suite in model.suites))
    if not names:
        raise DataError(
            "only lm-eval's tasks were scored, which scores.json has; no suite to compare by", where=run_dir
        )
    return Comparison(
        name=run_dir.name,
        models=models,
        suites=with_adjusted_p(compare_suite(name, models) for name in names),
        deciding_suite=deciding_suite or names[0],
        funnel=tuple(_read_funnel(run_dir / "curate" / "funnel.json")),
        questions=_read_question_funnels(run_dir / "generate"),
        num_hinted=_count(run_dir / "curate", "hinted", 0),
        audit=_read_audit(run_dir / "curate" / "audit.json"),
        stages=tuple(stage_costs(run_dir)),
        retention=read_retention(run_dir / "eval"),
        manifests=stage_manifests(run_dir),
        curves=tuple(read_curves(run_dir)),
    )


def compare_suite(name: str, models: Sequence[Model]) -> SuiteComparison:
    scored = tuple(model for model in models if model.card(name))
    families = {
        card.suite.partition("/")[2] for model in scored for card in model.cards if card.suite.startswith(f"{name}/")
    }
    return SuiteComparison(
        name=name,
        models=scored,
        students=tuple(_student_rows(scored, name)),
        size_steps=tuple(_size_steps(scored, name)),
        families=tuple(sorted(families)),
    )


def with_adjusted_p(suites: Iterable[SuiteComparison]) -> tuple[SuiteComparison, ...]:
    """The same suites: all their gains are one family of comparisons, all their size steps another."""
    suites = tuple(suites)
    gains = iter(holm([gain for suite in suites for row in suite.students for gain in row.gained.values()]))
    steps = iter(holm([step.difference for suite in suites for step in suite.size_steps]))
    return tuple(
        replace(
            suite,
            students=tuple(replace(row, gained={role: next(gains) for role in row.gained}) for row in suite.students),
            size_steps=tuple(replace(step, difference=next(steps)) for step in suite.size_steps),
        )
        for suite in suites
    )


def p_text(p: float) -> str:
    """`0.03`, `0.0004`, `under 0.0001`."""
    return "under 0.0001" if p < 1e-4 else f"{p:.1g}" if p < 0.1 else f"{p:.2f}"


def size_verdict(steps: Sequence[SizeStep]) -> str:
    """One sentence: is larger better, as far as these questions can tell?"""
    if not steps:
        return "There are no two distilled students of different size to compare."
    clear_gain = [step for step in steps if step.difference.clear and step.difference.value > 0]
    clear_loss = [step for step in steps if step.difference.clear and step.difference.value < 0]
    if len(clear_gain) == len(steps):
        return "Larger is better at every step, and clearly so with all steps taken together."
    counted = [
        (len(clear_gain), "larger is clearly better"),
        (len(steps) - len(clear_gain) - len(clear_loss), "the difference is not clear"),
        (len(clear_loss), "the larger student is clearly worse"),
    ]
    first, *others = [(count, what) for count, what in counted if count]
    if not others:
        return f"At every step {first[1]}."
    parts = [f"At {first[0]} of {len(steps)} steps {first[1]}", *(f"at {count} {what}" for count, what in others)]
    return f"{'; '.join(parts)}."


def difference_on(suite: str, a: Model, b: Model) -> Difference:
    """a - b on one suite, as if it were the only comparison: `holm` takes a family of them."""
    of_a, of_b = a.answers[suite], b.answers[suite]
    samples_each = (of_a.samples_per_question, of_b.samples_per_question)
    difference = paired_difference(of_a.means, of_b.means, samples_each)
    both = of_a.means.keys() & of_b.means.keys()
    values = [of_a.means[question] - of_b.means[question] for question in both]
    return replace(difference, bootstrap95=bootstrap_interval(values))


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
    """Seconds, peak memory and device of each stage; students that were trained one by one count as one stage."""
    costs: dict[str, dict[str, Any]] = {}
    manifests = stage_manifests(run_dir)
    for name, manifest in manifests.items():
        stage, _, part = name.partition("/")
        if part and stage in manifests:  # questions are written within the seconds of `generate`
            continue
        cost = costs.setdefault(stage, {"name": stage, "seconds": 0.0, "peak_rss_bytes": 0, "device": manifest.device})
        cost["seconds"] = round(cost["seconds"] + manifest.seconds, 3)
        cost["peak_rss_bytes"] = max(cost["peak_rss_bytes"], manifest.peak_rss_bytes)
    return list(costs.values())


def by_size(models: Sequence[Model]) -> tuple[Model, ...]:
    """The teacher, then the students smallest first, each with its roles in their order."""
    sizes: dict[str, int] = {}
    for model in models:
        sizes[model.student] = max(sizes.get(model.student, 0), model.num_parameters)

    def place(model: Model) -> tuple[bool, int, str, int]:
        return (model.role != "teacher", sizes[model.student], model.student, ROLES.index(model.role))

    return tuple(sorted(models, key=place))


def _student_rows(models: Sequence[Model], suite: str) -> list[StudentRow]:
    by_student: dict[str, dict[str, Model]] = {}
    for model in models:
        if model.role != "teacher":
            by_student.setdefault(model.student, {})[model.role] = model
    rows = []
    for student, of_role in by_student.items():
        scores = {role: card for role, model in of_role.items() if (card := model.card(suite))}
        gained = {}
        if "distilled" in of_role:
            for role in ("base", "direct"):
                if role in of_role:
                    gained[role] = difference_on(suite, of_role["distilled"], of_role[role])
        parameters = max(card.num_parameters for card in scores.values())
        rows.append(StudentRow(student, parameters, scores, gained))
    return rows


def _size_steps(models: Sequence[Model], suite: str) -> list[SizeStep]:
    """Every distilled student beside the next larger one: of its own architecture, else of any."""
    ladder = [model for model in models if model.role == "distilled"]
    steps = []
    for small in ladder:
        of_run = [model for model in ladder if model.run == small.run]
        larger = [model for model in of_run if model.num_parameters >= LIKE_SIZE * small.num_parameters]
        own = [model for model in larger if model.cards[0].architecture == small.cards[0].architecture]
        if larger:
            large = (own or larger)[0]
            difference = difference_on(suite, large, small)
            steps.append(SizeStep(small.student, large.student, difference, one_architecture=bool(own)))
    return steps


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    examples = [{name: str(example[name]) for name in DROPPED_FIELDS} for example in step.get("examples", ())]
    return {"filter": str(step["filter"]), "in": int(step["in"]), "out": int(step["out"]), "examples": examples}


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


def _read_audit(path: Path) -> AuditSummary | None:
    if not path.exists():
        return None
    try:
        return AuditSummary.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError(f"not an audit ({exc})", where=path) from exc
