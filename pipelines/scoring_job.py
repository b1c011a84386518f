"""One model to score: everything that a process needs for it, and what of that decides its scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.benchmarks import BENCHMARKS, BenchmarkPart, hub_identities, parts_of_suites
from distill.bundled import locate
from distill.gguf import checkpoint_folder
from distill.recipe import (
    BatchSize,
    ContestDates,
    Engine,
    Instruction,
    LmEvalConfig,
    NativeTeacher,
    ReadLimits,
    ServedEngine,
    TeacherConfig,
    VerifyConfig,
    VllmEngine,
    VllmServing,
    VllmTeacher,
)
from distill.records import Role, Sampling
from distill.verify.kept import grading_settings
from eval.harness import SAMPLES, SCORES
from eval.suites import TASKS, suite_files
from pipelines.regrade import GRADING, TASKS_FOLDER


@dataclass(frozen=True)
class ScoringJob:
    """One model to score; everything a worker process needs, picklable."""

    name: str
    role: Role
    model: Path | TeacherConfig
    instruction: Instruction
    question_alone: bool
    suites: tuple[str, ...]
    tasks: tuple[str, ...]
    lm_eval: LmEvalConfig
    num_samples: int | None
    sampling: Sampling | None
    seed: int
    limit: int | None
    contest_dates: ContestDates
    batch_size: BatchSize
    engine: Engine
    verify: VerifyConfig
    held_out: Path | None
    own: dict[str, Path]  # the problems of suites of the recipe's own
    compared: tuple[str, ...]  # those of them that have no references
    own_parts: tuple[BenchmarkPart, ...]  # benchmarks among them
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
    def num_gpus(self) -> int:
        """GPUs that it takes where there are any; 0 for a model that runs elsewhere."""
        if isinstance(self.model, Path):
            served = isinstance(self.engine, ServedEngine)
            return (self.engine.num_gpus if isinstance(self.engine, VllmEngine) else 0) if served else 1
        if isinstance(self.model, NativeTeacher):
            return self.model.num_ranks
        return self.model.num_gpus if isinstance(self.model, VllmTeacher) else 0

    @property
    def inputs(self) -> dict[str, Path]:
        files = task_files(self.suites, self.tasks, self.bench_data)
        if self.held_out is not None:
            files["held_out"] = self.held_out
        files |= {f"own:{name}": path for name, path in self.own.items()}
        return files if self.weights is None else files | {"model": self.weights}

    @property
    def is_server(self) -> bool:
        """Whether a server is started for it, which takes all cores of a machine without a GPU."""
        return isinstance(self.engine if isinstance(self.model, Path) else self.model, VllmServing)

    def sharing_graders(self, num_places: int) -> ScoringJob:
        """The job with its part of the processes that grade, where so many are scored side by side."""
        num_workers = max(1, self.verify.num_workers // num_places)
        return replace(self, verify=self.verify.model_copy(update={"num_workers": num_workers}))

    @property
    def outputs(self) -> list[str]:
        return [*([SAMPLES] if self.suites else []), SCORES, *([TASKS_FOLDER] if self.tasks else [])]

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
            **lm_eval_settings(self.tasks, self.lm_eval),
            "num_samples": self.num_samples,
            "sampling": None if self.sampling is None else self.sampling.model_dump(),
            "seed": self.seed,
            "limit": self.limit,
            "contest_dates": self.contest_dates.model_dump(mode="json"),
            GRADING: grading_settings(self.verify),
            **hub_identities([*parts_of_suites(self.suites), *self.own_parts], self.bench_data),
        }

    def _writer(self) -> dict[str, Any]:
        """Settings of the engine or teacher that can change a sample; a folder is known by its content."""
        if isinstance(self.model, Path):
            return engine_settings(self.engine)
        told = {"system_prompt", "prompt_suffix"}  # said by `instruction`
        if isinstance(self.model, NativeTeacher):
            told.add("reasoning")  # what is made of its texts; an endpoint's begin otherwise
        if self.weights is not None:
            told.add("model")
        return {name: value for name, value in self.model.identity().items() if name not in told}


def engine_settings(engine: Engine) -> dict[str, Any]:
    """What of an engine can change a sample; where it runs and how fast it is left out."""
    if not isinstance(engine, ServedEngine):
        return {"engine": engine}
    of_samples: dict[str, Any] = {"engine": engine.backend, "extra_body": engine.extra_body}
    if isinstance(engine, VllmEngine):
        return of_samples | {"numerics": engine.numerics, "max_model_len": engine.flags.get("max-model-len")}
    return of_samples | {"served": engine.served}


def lm_eval_settings(tasks: tuple[str, ...], config: LmEvalConfig) -> dict[str, Any]:
    """Which of lm-eval's tasks are asked, by which lm-eval, and how; nothing where none is."""
    if not tasks:
        return {}
    from eval.lm_eval.tasks import version

    return {"lm_eval": {"tasks": list(tasks), "version": version(), **config.identity()}}


def task_files(suites: tuple[str, ...], tasks: tuple[str, ...], bench_data: Path | None) -> dict[str, Path]:
    files = {f"protocol:{path.stem}": path for path in sorted(TASKS.glob("_*_protocol.yaml"))}
    files |= {"metrics": TASKS / "processors.py", "statistics": TASKS.parent / "statistics.py"}
    for suite in suites:
        if (task := TASKS / f"{suite}.yaml").exists():
            files[f"task:{suite}"] = task
        if suite not in BENCHMARKS:
            files["task:held_out"] = TASKS / "held_out.yaml"  # that of all problems of the recipe's own
    files |= {f"data:{suite}": path for suite, path in suite_files(suites, bench_data).items()}
    if tasks:
        from eval.lm_eval.tasks import data_files

        for task in tasks:
            files |= data_files(task, bench_data)
    return files
