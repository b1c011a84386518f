"""Grading again what is kept: the samples of an evaluation and the traces, without a model, when the graders change.

A model's samples are graded as they were asked for, by its manifest: the same suites, questions and numbers of samples.
Verdicts that these graders made already are taken as they are. What the verdicts lead to (samples.parquet, scores.json,
the report) is written again; which traces students learn from is not, since they have learned: that is `distill`'s.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder
from distill.errors import DataError
from distill.ledger import Ledger
from distill.manifest import outputs_present, read_manifest, rewrite_manifest
from distill.progress import Progress
from distill.protocols import Verifier
from distill.recipe import ContestDates, ReadLimits, Recipe, VerifyConfig
from distill.records import Sampling, ScoreCard, StageManifest, TeacherIdentity
from distill.tables import iterate_records
from distill.verify.kept import KeptVerdicts, grading_settings
from eval.answers import LEDGER, AbsentModel, KeptAnswers, NotKept
from eval.harness import SAMPLES, Subject, score_model, write_scores
from eval.retained import FOLDER
from eval.suites import check_suites, own_suite_file
from pipelines.context import Context
from pipelines.preemption import preemptible
from pipelines.run_folder import check_run_folder, held

SCORING, GRADING = "eval-model", "grading"  # the stage of one model, and the setting of it that this room changes
HELD_OUT = "held_out.parquet"
TASKS_FOLDER = "lm_eval"  # of a model's folder: lm-eval's own tasks, which lm-eval grades as it is asked
NEEDED = {"answers", "identity", "subject"}  # counts of a model's manifest, without which its samples are not found


@dataclass(frozen=True)
class Regraded:
    """One model's samples, or the traces: how many verdicts there are, how many of them are new ones and differ.

    `scores` are pass@1 of each suite, before and after.
    """

    name: str
    num_verdicts: int
    num_changed: int
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Regrading:
    """All that was graded again. `left` says in words what was not; `report` is the page that was written again."""

    versions: Mapping[str, str]
    models: Sequence[Regraded]
    traces: Regraded | None
    left: Sequence[str]
    report: Path | None


def graders_of(recipe: Recipe) -> VerifyConfig:
    """The graders of an evaluation: by rule alone, whoever judges the traces."""
    return recipe.verify.model_copy(update={"judge": None})


def regrade_run(recipe: Recipe, run_dir: Path, context: Context) -> Regrading:
    """Grade again what `run_dir` keeps, with the graders of today and the settings of `recipe`.

    Raises DataError where nothing is kept, or not all that a manifest speaks of, EnvironmentFault where more than a
    small share cannot be graded; then every model is as it was, or graded again.
    """
    models, left = _models(run_dir / "eval")
    traces = run_dir / "curate" / "verify"
    if not models and read_manifest(traces) is None:
        raise DataError(
            "; ".join(left) or "keeps nothing that could be graded again; run `potstill eval`", where=run_dir
        )
    suites = dict.fromkeys(suite for manifest in models.values() for suite in manifest.config["suites"])
    check_suites(suites, recipe.eval.own)
    check_run_folder(run_dir, [run_dir / name for name in ("curate", "eval", "report")])
    with held(run_dir), preemptible():
        regraded = _regrade_models(recipe, run_dir, models, context)
        of_traces = None
        if read_manifest(traces) is not None:
            if recipe.verify.judge is None:
                of_traces = _regrade_traces(recipe, run_dir, context)
            else:
                left.append("traces: a model judges them; `potstill distill` does it again")
        versions = grading_settings(graders_of(recipe))["grader_versions"]
        return Regrading(versions, regraded, of_traces, left, _write_report(recipe, run_dir, context))


def _models(eval_dir: Path) -> tuple[dict[Path, StageManifest], list[str]]:
    """The folders of models whose evaluation is complete and kept, and words about the others."""
    complete, left = {}, []
    for folder in sorted(path for path in eval_dir.glob("*/") if path.is_dir() and path.name != FOLDER):
        manifest, kept = read_manifest(folder), (folder / LEDGER).is_file()
        if kept and manifest is not None and manifest.counts.keys() >= NEEDED:
            complete[folder] = manifest
        elif kept:
            left.append(f"{folder.name}: its evaluation is not complete; `potstill eval` goes on with it")
        elif manifest is not None:
            left.append(f"{folder.name}: its samples were not kept one by one; `potstill eval` asks for them again")
    return complete, left


def _regrade_models(
    recipe: Recipe, run_dir: Path, models: Mapping[Path, StageManifest], context: Context
) -> list[Regraded]:
    from distill.verify import open_verifier

    grading, regraded = grading_settings(graders_of(recipe)), []
    how = {
        "held_out": run_dir / "eval" / HELD_OUT,
        "compared": recipe.eval.compared,
        "own": {name: own_suite_file(name, run_dir / "eval") for name in recipe.eval.own},
        "bench_data": bench_folder(recipe.bench_data, context.base_dir),
        "limits": recipe.limits,
        "max_unverifiable": recipe.eval.max_unverifiable,
    }
    with open_verifier(graders_of(recipe)) as verifier:
        for folder, manifest in models.items():
            if manifest.config[GRADING] == grading and outputs_present(folder, manifest):
                regraded.append(Regraded(folder.name, manifest.counts["answers"], 0))
                continue
            before, scores = _verdicts(folder / SAMPLES), manifest.counts["pass@1"]
            cards = grade_kept(folder, manifest, verifier, grading, context.progress, **how)
            after = _verdicts(folder / SAMPLES)
            changed = sum(before.get(sample, state) != state for sample, state in after.items())
            now = {card.suite: card.value for card in cards if card.suite in scores and card.metric == "pass@1"}
            moved = {suite: (scores[suite], value) for suite, value in now.items()}
            regraded.append(Regraded(folder.name, len(after), changed, moved))
    whole = read_manifest(run_dir / "eval")
    if whole is not None and all((run_dir / "eval" / name).exists() for name in whole.outputs):
        rewrite_manifest(run_dir / "eval", whole, {**whole.config, "verify": grading}, whole.counts)
    return regraded


def grade_kept(
    folder: Path,
    before: StageManifest,
    verifier: Verifier,
    grading: Mapping[str, Any],
    progress: Progress,
    *,
    held_out: Path | None,
    own: Mapping[str, Path],
    compared: Collection[str],
    bench_data: Path | None,
    limits: ReadLimits,
    max_unverifiable: float,
) -> list[ScoreCard]:
    """Write scores and manifest of one model again, from what its ledger keeps and `before`, its manifest, asked for.

    `grading` are the settings of `verifier`. Raises NotKept, with nothing written, where a sample is missing.
    """
    if not (folder / LEDGER).is_file():
        raise NotKept("no such ledger; run `potstill eval`", where=folder / LEDGER)
    asked, sampling = before.config, before.config["sampling"]
    identity = TeacherIdentity.model_validate(before.counts["identity"])
    subject = Subject(**before.counts["subject"])
    tasks = [ScoreCard.model_validate(card) for card in before.counts.get("lm_eval", [])]
    if tasks and not (folder / TASKS_FOLDER).is_dir():
        raise NotKept("no such folder; run `potstill eval`", where=folder / TASKS_FOLDER)
    with Ledger.open(folder / LEDGER) as ledger, KeptVerdicts(ledger, verifier, grading) as verdicts:
        answers = KeptAnswers(AbsentModel(identity, folder / LEDGER), ledger, verdicts, progress)
        cards: list[ScoreCard] = []
        if asked["suites"]:
            cards = score_model(
                answers,
                subject,
                asked["suites"],
                folder,
                sampling=None if sampling is None else Sampling.model_validate(sampling),
                held_out=held_out,
                own=own,
                compared=compared,
                bench_data=bench_data,
                limits=limits,
                max_unverifiable=max_unverifiable,
                contest_dates=ContestDates.model_validate(asked.get("contest_dates", {})),  # earlier runs had none
                num_answers=before.counts["answers"],
                **{name: asked[name] for name in ("seed", "num_samples", "question_alone", "limit")},
            )
    write_scores([*cards, *tasks], folder)
    counts = scoring_counts(cards, subject, identity, answers, tasks)
    rewrite_manifest(folder, before, {**asked, GRADING: dict(grading)}, counts)
    return cards


def scoring_counts(
    cards: Sequence[ScoreCard],
    subject: Subject,
    identity: TeacherIdentity,
    answers: KeptAnswers,
    tasks: Sequence[ScoreCard] = (),
) -> dict[str, Any]:
    """Counts of one model's manifest; `identity` and `subject` are what grading again needs to know of the model.

    `tasks` are the scores of lm-eval's own tasks, which no grader of ours can change.
    """
    totals = [card for card in cards if "/" not in card.suite and card.metric == "pass@1"]
    return {
        "samples": sum(card.num_samples for card in totals),
        "answers": answers.num_answers,
        "asked": answers.num_asked,
        "pass@1": {card.suite: card.value for card in totals},
        "identity": identity.model_dump(),
        "subject": vars(subject),
        **({"lm_eval": [card.model_dump(mode="json") for card in tasks]} if tasks else {}),
    }


def _verdicts(samples: Path) -> dict[tuple[str, str, int], str]:
    """The verdict of every sample of a file; none of one that is damaged, since it is about to be written again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("suite", "problem_id", "sample_index", "verdict")
    try:
        rows = pq.read_table(samples, columns=list(columns)).to_pylist()
    except (OSError, pa.ArrowException):
        return {}
    return {(row["suite"], row["problem_id"], row["sample_index"]): row["verdict"] for row in rows}


def _regrade_traces(recipe: Recipe, run_dir: Path, context: Context) -> Regraded:
    from pipelines.stages.curate import VERDICTS, GradedTrace, grade_traces

    made = run_dir / "curate" / "verify" / VERDICTS

    def states() -> array[int]:
        """Eight bytes a trace: there may be millions."""
        graded = iterate_records(made, GradedTrace) if made.exists() else ()
        return array("q", (hash((one.key, one.state)) for one in graded))

    before = states()
    grade_traces(recipe, run_dir, context)
    after = states()
    changed = sum(old != new for old, new in zip(before, after, strict=False))
    return Regraded("traces", len(after), changed)


def _write_report(recipe: Recipe, run_dir: Path, context: Context) -> Path | None:
    page = run_dir / "report" / "index.html"
    if not page.exists():
        return None
    from pipelines.stages.compare import compare

    compare(recipe, run_dir, context)
    return page
