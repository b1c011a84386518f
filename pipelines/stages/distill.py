"""Distill: curated examples and bases to students, one checkpoint folder for every student and method.

    R/distill/<student>-<method>/   the checkpoint, its train_log.json and a manifest of its own
    R/distill/manifest.json         all of them

Students are trained largest first, `num_workers` of them side by side in processes of their own. Each folder is
complete by itself: an interrupted stage trains only what is missing, and goes on from the last checkpoint of what was
under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cores import num_cores
from distill.errors import DataError
from distill.manifest import MANIFEST, current, hash_file, read_manifest, run_stage
from distill.progress import Progress
from distill.recipe import Method, Recipe, StudentConfig
from distill.records import StageManifest
from pipelines.context import Context
from pipelines.preemption import preemptible
from pipelines.workers import run_side_by_side

EXAMPLES = {"distilled": "examples.parquet", "direct": "direct.parquet"}
SEED = 17


@dataclass(frozen=True)
class TrainingJob:
    """One student to train with one method. Crosses over to another process."""

    student: StudentConfig
    method: Method
    examples: Path
    base: Path
    template: str
    out_dir: Path

    @property
    def name(self) -> str:
        return f"{self.student.name}-{self.method}"

    @property
    def inputs(self) -> dict[str, Path]:
        return {"examples": self.examples, "base": self.base}

    @property
    def config(self) -> dict[str, Any]:
        settings = self.student.model_dump(mode="json")
        return {"student": settings, "template": self.template, "method": self.method, "seed": SEED}

    def is_done(self) -> bool:
        return current("distill", self.inputs, self.config, self.out_dir) is not None


def distill(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Run the stage in `run_dir`/distill over what curation left in `run_dir`/curate.

    Raises RecipeError, DataError or CheckpointError for what was given, TrainingFailure for a loss that is not finite,
    EnvironmentFault for memory, disk or a killed process; finished students and checkpoints are kept in every case.
    """
    out_dir = run_dir / "distill"
    jobs = _jobs(recipe, run_dir)
    inputs = {f"{kind} {job.name}": path for job in jobs for kind, path in job.inputs.items()}
    config = {
        "distill": recipe.distill.model_dump(mode="json", exclude={"num_workers"}),
        "jobs": [job.config for job in jobs],
    }
    return run_stage(
        "distill",
        inputs,
        config,
        out_dir,
        lambda: _body(jobs, recipe.distill.num_workers, context.progress),
        [job.name for job in jobs],
    )


def _jobs(recipe: Recipe, run_dir: Path) -> list[TrainingJob]:
    """Every student with every method, largest first: the last to finish is then a small one."""
    from students.base_folder import locate, resolve_base
    from students.zoo import students_of

    jobs = []
    for student, methods in students_of(recipe.distill):
        base = resolve_base(student)
        path = locate(student.chat_template) if student.chat_template else None
        template = hash_file(path) if path and path.is_file() else ""
        for method in methods:
            examples = run_dir / "curate" / EXAMPLES[method]
            if not examples.is_file():
                raise DataError("not there yet; run `potstill distill` with this recipe", where=examples)
            out_dir = run_dir / "distill" / f"{student.name}-{method}"
            jobs.append(TrainingJob(student, method, examples, base, template, out_dir))
    # Worked examples are many times longer than bare answers, whatever the student.
    return sorted(jobs, key=lambda job: (job.method == "direct", -job.student.num_parameters))


def _body(jobs: list[TrainingJob], num_workers: int, progress: Progress) -> Mapping[str, Any]:
    missing = [job for job in jobs if not job.is_done()]
    with preemptible():
        if min(num_workers, len(missing)) > 1:
            threads = max(1, num_cores() // min(num_workers, len(missing)))
            run_side_by_side(
                train, [(job.name, job) for job in missing], num_workers, num_threads=threads, progress=progress
            )
        else:
            for job in missing:
                train(job, progress)
    manifests = {job.name: manifest for job in jobs if (manifest := read_manifest(job.out_dir))}
    return {
        "students": len(jobs),
        "trained": len(missing),
        "tokens": sum(manifest.counts["tokens"] for manifest in manifests.values()),
        "dropped": {name: manifest.counts["dropped"] for name, manifest in manifests.items()},
        "dropped_tokens": {name: manifest.counts["dropped_tokens"] for name, manifest in manifests.items()},
        "seconds": {name: manifest.seconds for name, manifest in manifests.items()},
    }


def train(job: TrainingJob, progress: Progress) -> None:
    """Train one student, in whatever process this is, and leave its manifest."""

    def body() -> Mapping[str, Any]:
        from students.sft import train_student

        log = train_student(job.student, job.examples, job.method, job.out_dir, seed=SEED, progress=progress)
        losses = [step["loss"] for step in log["steps"]]
        return {
            "examples": log["num_examples"],
            "tokens": log["num_tokens"],
            "dropped": log["num_dropped"],
            "dropped_tokens": log["num_dropped_tokens"],
            "steps": log["num_steps"],
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }

    run_stage("distill", job.inputs, job.config, job.out_dir, body, _files(job.out_dir))


def _files(folder: Path) -> Iterator[str]:
    """The files of a finished checkpoint, looked up when the manifest is written."""
    yield from sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
