"""The eval stage: teacher, bases, bare-answer students and distilled students of a recipe on its suites.

    run_dir/eval/held_out.parquet              the recipe's own held-out questions, none of them in the training set
    run_dir/eval/<model>/ledger.sqlite         each of the model's samples as soon as it is there, and its verdicts
    run_dir/eval/<model>/{samples.parquet, scores.json, manifest.json}
    run_dir/eval/manifest.json                 all of them together

Each model is a stage of its own: a new student is scored without scoring the others again, an interrupted run goes on
with the samples that are missing. What is kept and how it is graded again: `eval.answers`, `pipelines.regrade`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.benchmarks import bench_folder, hub_identities, parts_of_suites
from distill.bundled import locate
from distill.cores import num_cores
from distill.errors import DataError
from distill.gguf import checkpoint_folder
from distill.ledger import Ledger
from distill.manifest import StageRun, current, read_manifest, run_stage
from distill.problems import load_problems, normalise, source_files
from distill.progress import Progress
from distill.protocols import Teacher
from distill.recipe import (
    OWN_SUITES,
    BatchSize,
    EvalConfig,
    Instruction,
    NativeTeacher,
    ReadLimits,
    Recipe,
    ServedTeacher,
    TeacherConfig,
    VerifyConfig,
    VllmServing,
)
from distill.records import Example, Problem, Role, Sampling, StageManifest
from distill.tables import read_records, write_records
from distill.verify.kept import KeptVerdicts, grading_settings
from eval.answers import LEDGER, KeptAnswers, NotKept
from eval.harness import SAMPLES, SCORES, Subject, score_model
from eval.suites import TASKS, check_suites, suite_files
from pipelines.context import Context
from pipelines.preemption import preemptible
from pipelines.regrade import GRADING, HELD_OUT, SCORING, grade_kept, graders_of, scoring_counts
from pipelines.workers import run_side_by_side

MAX_WORKERS = 4  # each holds a model and the libraries, about 0.8 GB for a pico model


@dataclass(frozen=True)
class ScoringJob:
    """One model to score; everything a worker process needs, picklable."""

    name: str
    role: Role
    model: Path | TeacherConfig
    instruction: Instruction
    question_alone: bool
    suites: tuple[str, ...]
    num_samples: int | None
    sampling: Sampling | None
    seed: int
    limit: int | None
    batch_size: BatchSize
    engine: Literal["transformers", "native"]
    verify: VerifyConfig
    held_out: Path | None
    bench_data: Path | None
    limits: ReadLimits
    max_unverifiable: float
    out_dir: Path
    base_dir: Path

    @property
    def weights(self) -> Path | None:
        """The model's folder; none for an endpoint, nor for a repository of the Hub."""
        if isinstance(self.model, Path):
            return self.model
        if isinstance(self.model, NativeTeacher):
            return checkpoint_folder(locate(self.model.model, self.base_dir))
        if isinstance(self.model, VllmServing) and (folder := locate(self.model.model, self.base_dir)).exists():
            return folder
        return None

    @property
    def inputs(self) -> dict[str, Path]:
        files = _task_files(self.suites, self.bench_data)
        if self.held_out is not None:
            files["held_out"] = self.held_out
        return files if self.weights is None else files | {"model": self.weights}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that decide the scores besides the files; how fast they are made is left out."""
        return {
            "name": self.name,
            "role": self.role,
            "writer": self._writer(),
            "instruction": self.instruction.words,
            "question_alone": self.question_alone,
            "suites": list(self.suites),
            "num_samples": self.num_samples,
            "sampling": None if self.sampling is None else self.sampling.model_dump(),
            "seed": self.seed,
            "limit": self.limit,
            GRADING: grading_settings(self.verify),
            **hub_identities(parts_of_suites(self.suites), self.bench_data),
        }

    def _writer(self) -> dict[str, Any]:
        """Settings of the engine or teacher that can change a sample; a folder is known by its content."""
        if isinstance(self.model, Path):
            return {"engine": self.engine}
        told = {"system_prompt", "prompt_suffix"}  # said by `instruction`
        if isinstance(self.model, NativeTeacher):
            told.add("reasoning")  # what is made of its texts; an endpoint's begin otherwise
        if self.weights is not None:
            told.add("model")
        return {name: value for name, value in self.model.identity().items() if name not in told}


def evaluate(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Score every model of the recipe's roles. Raises DataError where a student has not been trained yet, or where a
    held-out question occurs among the training examples."""
    base_dir = context.base_dir
    config, out_dir = recipe.eval, run_dir / "eval"
    check_suites(config.suites)
    bench_data = bench_folder(recipe.bench_data, base_dir)
    num_workers = context.num_workers or _num_workers()
    graders = graders_of(recipe)
    graders = graders.model_copy(update={"num_workers": max(1, graders.num_workers // num_workers)})
    jobs = _jobs(recipe, run_dir, base_dir, bench_data, graders)
    examples = run_dir / "curate" / "examples.parquet"
    inputs = {f"model:{job.name}": path for job in jobs if (path := job.weights) is not None}
    inputs |= _suite_files(config, base_dir, bench_data)
    if examples.exists():
        inputs["examples"] = examples
    settings: dict[str, Any] = {
        "eval": config.identity(),
        "verify": grading_settings(graders_of(recipe)),
        "instruction": recipe.learned_instruction.words,
        "question_alone": bool(recipe.teacher.prompt_suffix),
    }
    if "teacher" in config.roles:
        settings["teacher"] = recipe.teacher.identity()
    settings |= hub_identities(parts_of_suites(config.suites), bench_data)

    def body() -> dict[str, Any]:
        counts = _write_held_out(recipe, out_dir, examples, base_dir)
        with preemptible():
            scored = _score_all(jobs, num_workers, context.progress)
        manifests = {job.name: manifest for job in jobs if (manifest := read_manifest(job.out_dir))}
        samples = sum(manifest.counts["samples"] for manifest in manifests.values())
        asked = sum(manifests[name].counts["asked"] for name in scored)
        return {**counts, "models": len(jobs), "samples": samples, "asked": asked}

    outputs = [f"{job.name}/{name}" for job in jobs for name in (SAMPLES, SCORES)]
    if config.held_out is not None:
        outputs.append(HELD_OUT)
    return run_stage("eval", inputs, settings, out_dir, body, outputs)


def _score_all(jobs: list[ScoringJob], num_workers: int, progress: Progress) -> list[str]:
    """Score the models that are not, and return their names.

    Tiny models are bound by single operations, which threads do not help: two cores are two models at a time.
    """
    missing = [job for job in jobs if current(SCORING, job.inputs, job.settings, job.out_dir) is None]
    workers = min(num_workers, len(missing))
    if workers > 1:
        threads = max(1, num_cores() // workers)
        run_side_by_side(score, [(j.name, j) for j in missing], workers, num_threads=threads, progress=progress)
    else:
        for job in missing:
            score(job, progress)
    return [job.name for job in missing]


def score(job: ScoringJob, progress: Progress) -> None:
    """One model's stage, in whatever process this is: open it, score it, leave its manifest.

    Where grading is all that has changed, what is kept is graded again, and no model is opened.
    """
    from distill.verify import open_verifier

    stage_run = StageRun(SCORING, job.inputs, job.settings, job.out_dir)
    how = {name: getattr(job, name) for name in ("held_out", "bench_data", "limits", "max_unverifiable")}
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
                        **how,
                    )
            finally:
                model.close()
            return scoring_counts(cards, subject, model.identity, answers)

        stage_run.run(body, [SAMPLES, SCORES])


def _open(job: ScoringJob, progress: Progress) -> tuple[Teacher, Subject]:
    from teacher.backends import open_student, open_teacher

    if isinstance(job.model, Path):
        how = {"engine": job.engine, "batch_size": job.batch_size, "instruction": job.instruction}
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
    given = config.model_fields_set
    own = set(config.suites) <= set(OWN_SUITES)  # no protocol of their own: the recipe's settings hold, defaults too
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
            suites=config.suites,
            num_samples=config.num_samples if own or "num_samples" in given else None,
            sampling=config.sampling if own or "sampling" in given else None,
            seed=config.sampling.seed,
            limit=config.limit,
            batch_size=config.batch_size,
            engine=config.engine,
            verify=graders,
            held_out=None if config.held_out is None else run_dir / "eval" / HELD_OUT,
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
    held_out = [] if config.held_out is None else [config.held_out]
    return _task_files(config.suites, bench_data) | source_files(held_out, base_dir=base_dir)


def _task_files(suites: tuple[str, ...], bench_data: Path | None) -> dict[str, Path]:
    files = {
        "protocol": TASKS / "_r1_protocol.yaml",
        "metrics": TASKS / "processors.py",
        "statistics": TASKS.parent / "statistics.py",
    }
    for suite in suites:
        files[f"task:{suite}"] = TASKS / f"{suite}.yaml"
        if suite in OWN_SUITES:
            files["task:held_out"] = TASKS / "held_out.yaml"  # both are this one
    return files | {f"data:{suite}": path for suite, path in suite_files(suites, bench_data).items()}


def _write_held_out(recipe: Recipe, out_dir: Path, examples: Path, base_dir: Path) -> dict[str, int]:
    """Write the held-out problems and check that training never saw one of them. Raises DataError."""
    config, learned = recipe.eval, recipe.learned_instruction
    if config.held_out is None:
        return {"held_out": 0, "training_questions": 0, "shared_with_training": 0}
    # By id, which is a hash: a `limit` then takes a fair share of every family.
    problems = sorted(load_problems([config.held_out], base_dir=base_dir), key=lambda problem: problem.id)
    trained = (
        {normalise(example.question) for example in read_records(examples, Example)} if examples.exists() else set()
    )
    shared = [problem for problem in problems if normalise(learned.asked(problem.prompt)) in trained]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(problems)} held-out questions occur among the training examples, "
            f"the first is {shared[0].prompt[:80]!r}",
            where=examples,
            field="question",
        )
    write_records(out_dir / HELD_OUT, problems, Problem)
    return {"held_out": len(problems), "training_questions": len(trained), "shared_with_training": 0}


def _num_workers() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(num_cores(), MAX_WORKERS)
