"""The eval stage: teacher, bases, bare-answer students and distilled students of a recipe on its suites.

    run_dir/eval/held_out.parquet              the recipe's own held-out questions, none of them in the training set
    run_dir/eval/<model>/ledger.sqlite         each of the model's samples as soon as it is there, and its verdicts
    run_dir/eval/<model>/{samples.parquet, scores.json, manifest.json}
    run_dir/eval/<model>/lm_eval/<task>.jsonl  documents of lm-eval's own tasks, with the answers and their metrics
    run_dir/eval/manifest.json                 all of them together

Each model is a stage of its own: a new student is scored without scoring the others again, an interrupted run goes on
with the samples that are missing. What is kept and how it is graded again: `eval.answers`, `pipelines.regrade`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder, hub_identities
from distill.cores import num_cores
from distill.device import visible_gpus
from distill.errors import DataError
from distill.ledger import Ledger
from distill.manifest import StageRun, current, read_manifest, run_stage
from distill.problems import benchmark_parts, load_problems, normalise, source_files
from distill.progress import Progress
from distill.protocols import Teacher, TokenModel
from distill.recipe import (
    EvalConfig,
    Recipe,
    ServedEngine,
    ServedTeacher,
    TeacherConfig,
    VerifyConfig,
)
from distill.records import Example, Problem, Role, ScoreCard, StageManifest
from distill.tables import read_records, write_records
from distill.verify.kept import KeptVerdicts, grading_settings
from eval.answers import LEDGER, KeptAnswers, NotKept
from eval.harness import Subject, score_model, write_scores
from eval.retained import FOLDER, RETENTION
from eval.suites import check_suites, own_suite_file, own_suites, parts_asked
from pipelines.context import Context
from pipelines.preemption import preemptible
from pipelines.regrade import GRADING, HELD_OUT, SCORING, TASKS_FOLDER, grade_kept, graders_of, scoring_counts
from pipelines.retention import compare_answers
from pipelines.scoring_job import ScoringJob, engine_settings, lm_eval_settings, task_files
from pipelines.workers import run_side_by_side

MAX_WORKERS = 4  # without a GPU: each holds a model and the libraries, about 0.8 GB for a pico model


def evaluate(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Score every model of the recipe's roles. Raises DataError where a student has not been trained yet, or where a
    held-out question occurs among the training examples."""
    base_dir = context.base_dir
    config, out_dir = recipe.eval, run_dir / "eval"
    check_suites(config.suites, config.own, context.progress)
    bench_data = bench_folder(recipe.bench_data, base_dir)
    gpus = visible_gpus() if context.gpus is None else context.gpus
    jobs = _jobs(recipe, run_dir, base_dir, bench_data, graders_of(recipe))
    examples = run_dir / "curate" / "examples.parquet"
    inputs = {f"model:{job.name}": path for job in jobs if (path := job.weights) is not None}
    inputs |= _suite_files(config, base_dir, bench_data)
    if examples.exists():
        inputs["examples"] = examples
    settings: dict[str, Any] = {
        "eval": config.identity(),
        **lm_eval_settings(config.lm_eval_tasks, config.lm_eval),
        "verify": grading_settings(graders_of(recipe)),
        "instruction": recipe.learned_instruction.words,
        "question_alone": bool(recipe.teacher.prompt_suffix),
    }
    if not config.lm_eval_tasks:
        del settings["eval"]["lm_eval"]
    if isinstance(config.engine, ServedEngine):  # most of what it is set to changes no sample
        del settings["eval"]["engine"]
        settings["engine"] = engine_settings(config.engine)
    if "teacher" in config.roles:
        settings["teacher"] = recipe.teacher.identity()
    settings |= hub_identities(parts_asked(config), bench_data)

    def body() -> dict[str, Any]:
        counts = _write_own_problems(recipe, out_dir, examples, base_dir, bench_data)
        with preemptible():
            scored = _score_all(jobs, gpus, context.num_workers, context.progress)
            compare_answers(recipe, run_dir, [job.name for job in jobs], context)
        manifests = {job.name: manifest for job in jobs if (manifest := read_manifest(job.out_dir))}
        samples = sum(manifest.counts["samples"] for manifest in manifests.values())
        asked = sum(manifests[name].counts["asked"] for name in scored)
        return {**counts, "models": len(jobs), "samples": samples, "asked": asked}

    outputs = [f"{job.name}/{name}" for job in jobs for name in job.outputs]
    if config.compared:
        outputs.append(f"{FOLDER}/{RETENTION}")
    outputs += [own_suite_file(name, out_dir).name for name in own_suites(config)]
    return run_stage("eval", inputs, settings, out_dir, body, outputs)


def _score_all(jobs: list[ScoringJob], gpus: tuple[str, ...], num_workers: int | None, progress: Progress) -> list[str]:
    """Score the models that are not, and return their names.

    Those that need as many GPUs share out what there is, as many of them at a time as it has room for; those that need
    more come first. Without a GPU, tiny models are bound by single operations, which threads do not help: two cores are
    two models at a time.
    """
    missing = [job for job in jobs if current(SCORING, job.inputs, job.settings, job.out_dir) is None]
    for num_gpus in sorted({job.num_gpus for job in missing}, reverse=True):
        alike = [job for job in missing if job.num_gpus == num_gpus]
        places = _places(gpus, num_gpus) if gpus else _places_of_cpu(alike)
        places = places[: min(num_workers or len(places), len(alike))]
        if len(places) == 1:
            for job in alike:
                score(job, progress)
            continue
        shared = [job.sharing_graders(len(places)) for job in alike]
        named = [(job.name, job) for job in shared]
        how: dict[str, Any] = {"num_threads": max(1, num_cores() // len(places)), "environments": places}
        run_side_by_side(score, named, len(places), progress=progress, **how)
    return [job.name for job in missing]


def _places(gpus: tuple[str, ...], num_gpus: int) -> list[dict[str, str]]:
    """Variables of the processes that score models of so many GPUs each side by side."""
    if not num_gpus:
        return [{}]
    starts = range(0, max(len(gpus) - num_gpus, 0) + 1, num_gpus)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + num_gpus])} for start in starts]


def _places_of_cpu(jobs: list[ScoringJob]) -> list[dict[str, str]]:
    return [{}] * (1 if any(job.is_server for job in jobs) else min(num_cores(), MAX_WORKERS))


def score(job: ScoringJob, progress: Progress) -> None:
    """One model's stage, in whatever process this is: open it, score it, leave its manifest.

    Where grading is all that has changed, what is kept is graded again, and no model is opened.
    """
    from distill.verify import open_verifier

    stage_run = StageRun(SCORING, job.inputs, job.settings, job.out_dir)
    how = {
        name: getattr(job, name) for name in ("held_out", "own", "compared", "bench_data", "limits", "max_unverifiable")
    }
    with open_verifier(job.verify) as verifier:
        if (before := stage_run.current_but_for(GRADING)) is not None:
            with suppress(NotKept):  # the ledger has lost some
                grade_kept(job.out_dir, before, verifier, job.settings[GRADING], progress, **how)
                return

        def body() -> dict[str, Any]:
            with progress.task(f"load {job.name}", None):
                model, subject = _open(job, progress)
            try:
                with (
                    Ledger.open(job.out_dir / LEDGER) as ledger,
                    KeptVerdicts(ledger, verifier, job.settings[GRADING]) as verdicts,
                ):
                    answers = KeptAnswers(model, ledger, verdicts, progress)
                    cards: list[ScoreCard] = []
                    if job.suites:
                        cards = score_model(
                            answers,
                            subject,
                            job.suites,
                            job.out_dir,
                            seed=job.seed,
                            num_samples=job.num_samples,
                            sampling=job.sampling,
                            question_alone=job.question_alone,
                            limit=job.limit,
                            contest_dates=job.contest_dates,
                            **how,
                        )
                    tasks, num_asked = _score_tasks(job, model, subject, ledger, progress)
                    write_scores([*cards, *tasks], job.out_dir)
            finally:
                model.close()
            counts = scoring_counts(cards, subject, model.identity, answers, tasks)
            return counts | {"asked": counts["asked"] + num_asked}

        stage_run.run(body, job.outputs)


def _score_tasks(
    job: ScoringJob, model: Teacher, subject: Subject, ledger: Ledger, progress: Progress
) -> tuple[list[ScoreCard], int]:
    """ScoreCards of lm-eval's own tasks, and how many of the answers the ledger did not have."""
    if not job.tasks:
        return [], 0
    from eval.lm_eval.kept import KeptTokens
    from eval.lm_eval.scoring import score_task

    assert isinstance(model, TokenModel), "the recipe is refused where its engine is none"
    kept, out_dir = KeptTokens(model, ledger, progress), job.out_dir / TASKS_FOLDER
    how = {"config": job.lm_eval, "seed": job.seed, "limit": job.limit, "bench_data": job.bench_data}
    cards = [card for task in job.tasks for card in score_task(kept, subject, task, out_dir, progress, **how)]
    return cards, kept.num_asked


def _open(job: ScoringJob, progress: Progress) -> tuple[Teacher, Subject]:
    from teacher.backends import open_student, open_teacher

    if isinstance(job.model, Path):
        how = {"engine": job.engine, "batch_size": job.batch_size, "instruction": job.instruction}
        how |= {"name": job.name, "log_dir": job.out_dir}
        model = open_student(job.model, progress=progress, **how)
    else:
        model = open_teacher(job.model, base_dir=job.base_dir, log_dir=job.out_dir, progress=progress)
    if job.weights is None or isinstance(job.model, ServedTeacher):
        return model, Subject(job.name, job.role, "served", 0, 0)  # an endpoint does not say how large its model is
    from teacher.models.load import read_facts

    facts = read_facts(job.weights)
    return model, Subject(job.name, job.role, facts.model_type, facts.num_parameters, facts.num_active)


def _jobs(
    recipe: Recipe, run_dir: Path, base_dir: Path, bench_data: Path | None, graders: VerifyConfig
) -> list[ScoringJob]:
    """The models of the recipe's roles, the slowest to score first: the teacher, then the larger students."""
    from students.base_folder import resolve_base
    from students.zoo import students_of

    config = recipe.eval
    models: list[tuple[str, Role, Path | TeacherConfig]] = []
    if "teacher" in config.roles:
        models.append(("teacher", "teacher", recipe.teacher))
    for student, methods in sorted(students_of(recipe.distill), key=lambda chosen: -chosen[0].num_parameters):
        if "base" in config.roles:
            models.append((f"{student.name}-base", "base", resolve_base(student)))
        for method in methods:
            folder = run_dir / "distill" / f"{student.name}-{method}"
            if method in config.roles:
                if not (folder / "manifest.json").exists():
                    raise DataError("this student has not been trained yet: run distill first", where=folder)
                models.append((f"{student.name}-{method}", method, folder))
    if not models:
        raise DataError("no model has one of these roles", where="recipe", field="eval.roles")
    return [
        ScoringJob(
            name=name,
            role=role,
            model=model,
            # The teacher is asked as for its traces; bases in the words in which their students learned.
            instruction=recipe.teacher.instruction if role == "teacher" else recipe.learned_instruction,
            question_alone=bool(recipe.teacher.prompt_suffix),
            suites=config.our_suites,
            tasks=config.lm_eval_tasks,
            lm_eval=config.lm_eval,
            num_samples=config.stated("num_samples"),
            sampling=config.stated("sampling"),
            seed=config.sampling.seed,
            limit=config.limit,
            contest_dates=config.contest_dates,
            batch_size=config.batch_size,
            engine=config.engine,
            verify=graders,
            held_out=None if config.held_out is None else run_dir / "eval" / HELD_OUT,
            own={name: own_suite_file(name, run_dir / "eval") for name in config.own},
            compared=config.compared,
            own_parts=tuple(benchmark_parts(config.own.values())),
            bench_data=bench_data,
            limits=recipe.limits,
            max_unverifiable=config.max_unverifiable,
            out_dir=run_dir / "eval" / name,
            base_dir=base_dir,
        )
        for name, role, model in models
    ]


def _suite_files(config: EvalConfig, base_dir: Path, bench_data: Path | None) -> dict[str, Path]:
    """Files that decide the questions of all models: the suites' and the problem set behind the held-out source."""
    own = source_files(own_suites(config).values(), base_dir=base_dir, bench_data=bench_data)
    return task_files(config.our_suites, config.lm_eval_tasks, bench_data) | own


def _write_own_problems(
    recipe: Recipe, out_dir: Path, examples: Path, base_dir: Path, bench_data: Path | None
) -> dict[str, int]:
    """Write the problems that the recipe brings and check that training never saw one of them. Raises DataError."""
    learned, sources = recipe.learned_instruction, own_suites(recipe.eval)
    counts = {"held_out": 0, "training_questions": 0, "shared_with_training": 0}
    if not sources:
        return counts
    trained = (
        {normalise(example.question) for example in read_records(examples, Example)} if examples.exists() else set()
    )
    for name, source in sources.items():
        # By id, which is a hash: a `limit` then takes a fair share of every family.
        problems = load_problems([source], base_dir=base_dir, limits=recipe.limits, bench_data=bench_data)
        problems.sort(key=lambda problem: problem.id)
        shared = [problem for problem in problems if normalise(learned.asked(problem.prompt)) in trained]
        if shared:
            raise DataError(
                f"{len(shared)} of {len(problems)} {name.replace('_', '-')} questions occur among the training "
                f"examples, the first is {shared[0].prompt[:80]!r}",
                where=examples,
                field="question",
            )
        write_records(own_suite_file(name, out_dir), problems, Problem)
        counts["held_out"] += len(problems)
    return {**counts, "training_questions": len(trained)}
