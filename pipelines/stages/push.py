"""Push: the best distilled student by the suite that decides, or the one that the recipe names, to the Hub.

R/push/model/          what was uploaded: the checkpoint's files and the model card
R/push/manifest.json   repository, commit, and the name and size of every file
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.benchmarks import BENCHMARKS
from distill.bundled import locate
from distill.errors import DataError, RecipeError, nearest
from distill.manifest import read_manifest, run_stage
from distill.model_folder import read_config_json
from distill.publish.origin import published_name
from distill.publish.synthesised import question_funnels
from distill.recipe import LM_EVAL, ProblemSource, Recipe, StudentConfig, parse
from distill.records import ScoreCard, StageManifest
from eval.compare import best_student
from eval.conditions import shown_conditions
from eval.harness import SAMPLES
from eval.scored import read_model
from pipelines.context import Context


def push(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Push one student. A dry run touches neither the network nor the disk: its manifest only says what would go.

    Raises RecipeError for a student or repository name, DataError where nothing is trained or scored yet,
    EnvironmentFault for a Hub that refuses or is not reached.
    """
    scores = _scores(run_dir)
    chosen = recipe.push.student
    name = f"{chosen}-distilled" if chosen else best_name(scores, recipe.deciding_suite, run_dir)
    folder = run_dir / "distill" / name
    if not (folder / "config.json").is_file():
        trained = [path.parent.name for path in (run_dir / "distill").glob("*-distilled/config.json")]
        known = [other.removesuffix("-distilled") for other in trained]
        raise RecipeError(
            f"no distilled student {name.removesuffix('-distilled')!r} in {run_dir / 'distill'}; "
            + (nearest(name.removesuffix("-distilled"), known) if known else "nothing is trained yet"),
            where="recipe",
            field="push.student",
        )
    read_config_json(folder)  # what names code is not handed on either
    card, student, repo = _card(recipe, run_dir, folder, scores, context.base_dir)
    teacher = _teacher(recipe, context.base_dir).replace("`", "")
    inputs = {"model": folder, **{f"scores {path.parent.name}": path for path in _score_files(run_dir)}}
    config = {"push": recipe.push.model_dump(mode="json"), "repo": repo, "student": student.name}
    if context.dry_run:
        return _dry_run_manifest(config, folder, card, private=recipe.push.private)
    out_dir = run_dir / "push"

    def body() -> Mapping[str, Any]:
        from distill.publish.hub import push_folder
        from students.publish.hub import lay_out, tree

        lay_out(folder, card, out_dir / "model")
        with context.progress.task(f"push {repo}", 1, unit="commits") as task:
            message = f"Distilled from {teacher} with the recipe {recipe.name}"
            done = push_folder(out_dir / "model", repo, repo_type="model", private=recipe.push.private, message=message)
            task.advance(1)
        files = tree(folder, card)
        return {
            "repo": done.repo_id,
            "url": done.url,
            "commit": done.commit,
            "private": recipe.push.private,
            "files": len(files),
            "bytes": sum(files.values()),
            "tree": files,
        }

    return run_stage("push", inputs, config, out_dir, body, ["model"])


def best_name(scores: list[ScoreCard], suite: str, run_dir: Path) -> str:
    """The best distilled student by the suite that decides. Raises DataError where none is scored on it."""
    best = best_student(scores, suite)
    if best is None:
        message = f"no distilled student is scored on {suite} yet; run `potstill eval`, or name push.student"
        raise DataError(message, where=run_dir)
    return best.name


def _score_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "eval").glob("*/scores.json"))


def _scores(run_dir: Path) -> list[ScoreCard]:
    """Every score on suites of ours; from report/summary.json where the score cards themselves are not here."""
    cards = []
    for path in _score_files(run_dir) or [run_dir / "report" / "summary.json"]:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            entries = tree["models"] if isinstance(tree, dict) else tree
            cards += [ScoreCard.model_validate(entry) for entry in entries]
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError, ValidationError) as exc:
            raise DataError(f"not a file of score cards ({type(exc).__name__})", where=path) from exc
    return [card for card in cards if not card.suite.startswith(LM_EVAL)]


def _card(
    recipe: Recipe, run_dir: Path, folder: Path, scores: list[ScoreCard], base_dir: Path
) -> tuple[str, StudentConfig, str]:
    from students.publish.card import Lineage, model_card
    from students.publish.hub import check_repo_name

    try:
        log = json.loads((folder / "train_log.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError("not a training log; train the student again", where=folder / "train_log.json") from exc
    trained = parse(StudentConfig, log["student"], where=folder / "train_log.json")
    student = trained.model_copy(update={"licence": _licence_now(trained, recipe)})
    repo = recipe.push.repo.replace("{student}", student.name)
    check_repo_name(repo, student)
    # Its base, its size's control and the teacher stand beside it; families are for the report.
    beside = {folder.name, f"{student.name}-direct", f"{student.name}-base", student.name}
    shown = [score for score in scores if "/" not in score.suite and (score.name in beside or score.role == "teacher")]
    manifest = read_manifest(folder)
    lineage = Lineage(
        recipe=recipe.name,
        teacher=_teacher(recipe, base_dir),
        problems="; ".join(_problems(recipe.problems)),
        instruction=recipe.learned_instruction,
        funnel=_funnel(run_dir),
        questions=question_funnels(read_manifest(run_dir / "generate")),
        num_hinted=_num_hinted(run_dir),
        hashes=_hashes(run_dir, folder),
        conditions=_conditions(run_dir, shown),
        versions={key: value for key, value in (manifest.versions if manifest else {}).items() if value[:1].isdigit()},
    )
    return model_card(repo, student, log, shown, lineage), student, repo


def _conditions(run_dir: Path, scores: Iterable[ScoreCard]) -> list[dict[str, str]]:
    """How each of these scores came about; nothing where the samples are not here."""
    wanted = dict.fromkeys((score.name, score.suite) for score in scores)
    folders = {name: run_dir / "eval" / name for name, _ in wanted}
    models = {name: read_model(folder) for name, folder in folders.items() if (folder / SAMPLES).exists()}
    there = [(models[name], suite) for name, suite in wanted if name in models]
    return [shown_conditions(model, suite) for model, suite in there if suite in model.answers]


def _licence_now(trained: StudentConfig, recipe: Recipe) -> str:
    """The licence as the student's file has it: a mistake in it is mended without training again."""
    from students.zoo import students_of

    students = [student for student, _ in students_of(recipe.distill)]
    return next((student.licence for student in students if student.name == trained.name), trained.licence)


def _dry_run_manifest(config: dict[str, Any], folder: Path, card: str, *, private: bool) -> StageManifest:
    from students.publish.hub import tree

    files = tree(folder, card)
    counts = {"repo": config["repo"], "private": private, "files": len(files), "bytes": sum(files.values())}
    return StageManifest(
        stage="push",
        fingerprint="dry run",
        inputs={},
        config=config,
        outputs={},
        versions={},
        counts={**counts, "tree": files, "card": card},
        seconds=0,
        peak_rss_bytes=0,
    )


def _teacher(recipe: Recipe, base_dir: Path) -> str:
    return published_name(recipe.teacher.model, locate(recipe.teacher.model, base_dir))


def _problems(sources: Iterable[ProblemSource]) -> list[str]:
    lines = []
    for source in sources:
        if source.kind == "reasoning_gym":
            lines.append(f"reasoning-gym, {source.count:,} problems, seed {source.seed}, split {source.split}")
        elif source.kind == "local":
            lines.append(f"`{Path(source.path).name}`")
        elif source.kind == "benchmark":
            benchmark = BENCHMARKS[source.name]
            lines.append(f"{source.name} (`{benchmark.repo}`, {benchmark.licence}), split {source.split}")
        elif source.kind == "synthesised":
            writer = "the teacher" if source.teacher is None else f"`{Path(source.teacher.model).name}`"
            seeds = ", ".join(_problems(source.seeds))
            lines.append(f"up to {source.count:,} that {writer} wrote after {seeds}, kept where its answers agree")
        else:
            lines.append(f"`{source.repo}` at `{source.revision}`, split {source.split}")
    return lines


def _num_hinted(run_dir: Path) -> int:
    """Examples whose traces were asked with the reference as a hint."""
    curated = read_manifest(run_dir / "curate")
    return int(curated.counts.get("hinted", 0)) if curated else 0


def _funnel(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "curate" / "funnel.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
    except (OSError, ValueError) as exc:
        raise DataError("not a funnel of curation", where=path) from exc


def _hashes(run_dir: Path, folder: Path) -> dict[str, str]:
    """Hashes of what the student's manifest read (base, examples) and of what stands behind that (teacher, traces)."""
    student, generated = read_manifest(folder), read_manifest(run_dir / "generate")
    hashes = dict(student.inputs) if student else {}
    if student:
        hashes |= {name: digest for name, digest in student.outputs.items() if name.endswith(".safetensors")}
    if generated:
        hashes |= {"teacher": generated.inputs["teacher"]} if "teacher" in generated.inputs else {}
        hashes |= {name: digest for name, digest in generated.outputs.items() if name == "traces"}
    return hashes
