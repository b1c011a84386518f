"""Generate: problems and a teacher to traces, every sample once.

    R/generate/ledger.sqlite      each sample as soon as it is there; survives whatever happens
    R/generate/problems.parquet   the questions, in the order of the recipe
    R/generate/traces/            the samples of these questions, by question and sample index, in Parquet shards

Only samples that the ledger does not have are asked for, so an interrupted run goes on where it stopped, and a recipe
that asks for sixteen samples where it asked for four asks for twelve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError, EnvironmentFault
from distill.export import export_traces
from distill.ledger import Ledger
from distill.manifest import is_current, read_manifest, run_stage
from distill.problems import load_problems, source_files
from distill.progress import Progress, Task
from distill.protocols import Teacher
from distill.recipe import NativeTeacher, Recipe, ServedTeacher, TeacherConfig, VllmTeacher
from distill.records import Completion, Problem, Sampling, StageManifest, TeacherIdentity, Trace, TraceRequest
from distill.tables import write_records
from pipelines.preemption import preemptible
from pipelines.stages.live import live

LEDGER, PROBLEMS, TRACES = "ledger.sqlite", "problems.parquet", "traces"
FLUSH_SAMPLES = 64
FLUSH_S = 5.0
# What changes how fast and how patiently a teacher is asked, and nothing of what it writes.
SPEED = {"batch_size", "max_concurrency", "timeout_s", "idle_timeout_s", "stream", "max_retries", "api_key_env"}
SPEED |= {"startup_timeout_s", "max_restarts", "num_nodes", "head_address", "rpc_port"}
# What is noted of the samples besides, and changes none of them.
PRICES = {"price_per_million_prompt_tokens", "price_per_million_completion_tokens"}

OpenTeacher = Callable[[TeacherConfig], Teacher]


def generate(
    recipe: Recipe,
    out_dir: Path,
    progress: Progress,
    *,
    base_dir: Path | None = None,
    open_teacher: OpenTeacher | None = None,
) -> StageManifest:
    """Run the stage in `out_dir`. `open_teacher` makes the teacher; by default it is the backend of the recipe.

    Raises RecipeError, DataError or CheckpointError before anything is written; EnvironmentFault, Preempted or
    KeyboardInterrupt with all finished samples in the ledger.
    """
    base_dir = base_dir or Path.cwd()
    inputs = source_files(recipe.problems, base_dir=base_dir)
    if isinstance(recipe.teacher, NativeTeacher):
        inputs["teacher"] = _checkpoint_folder(base_dir / recipe.teacher.model)
    elif isinstance(recipe.teacher, VllmTeacher) and (base_dir / recipe.teacher.model).is_dir():
        inputs["teacher"] = base_dir / recipe.teacher.model
    config = _what_matters(recipe)
    if is_current("generate", inputs, config, out_dir):
        done = read_manifest(out_dir)
        assert done is not None
        return done
    problems = load_problems(recipe.problems, base_dir=base_dir)
    teacher = (open_teacher or _backend(base_dir, out_dir, progress))(recipe.teacher)
    try:
        return run_stage(
            "generate",
            inputs,
            config,
            out_dir,
            lambda: _body(problems, teacher, recipe, out_dir, progress),
            (PROBLEMS, TRACES),
        )
    finally:
        teacher.close()


def _what_matters(recipe: Recipe) -> dict[str, Any]:
    return {
        "problems": [source.model_dump(mode="json") for source in recipe.problems],
        "teacher": recipe.teacher.model_dump(mode="json", exclude=SPEED | PRICES),
        "generate": recipe.generate.model_dump(mode="json"),
    }


def _checkpoint_folder(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError("no such checkpoint folder", where=path, field="teacher.model")
    return path


def _backend(base_dir: Path, log_dir: Path, progress: Progress) -> OpenTeacher:
    from teacher.backends import open_teacher  # may bring torch in

    def opened(config: TeacherConfig) -> Teacher:
        teacher: Teacher = open_teacher(config, base_dir=base_dir, log_dir=log_dir, progress=progress)
        return teacher

    return opened


def _body(
    problems: list[Problem], teacher: Teacher, recipe: Recipe, out_dir: Path, progress: Progress
) -> Mapping[str, Any]:
    sampling, identity = recipe.generate.sampling, teacher.identity
    requests = {
        request.key(identity, sampling): request
        for problem in problems
        for request in (TraceRequest(problem=problem, sample_index=i) for i in range(recipe.generate.num_samples))
    }
    write_records(out_dir / PROBLEMS, problems, Problem)
    with preemptible(), Ledger.open(out_dir / LEDGER) as ledger:
        missing = ledger.missing(requests)
        done = len(requests) - len(missing)
        if missing:
            bar = progress.task("generate", total=len(requests), done=done, unit="samples")
            with bar as plain, live(plain, teacher) as task:
                _ask(teacher, [requests[key] for key in missing], sampling, ledger, task)
            if left := ledger.missing(requests):
                raise EnvironmentFault(f"the teacher left {len(left)} samples out", where=recipe.teacher.model)
        with progress.task("export", total=len(requests), unit="samples") as task:
            exported = export_traces(ledger, lambda: iter(requests), out_dir / TRACES, task)
    cost = _cost(recipe.teacher, out_dir / TRACES)
    return {"problems": len(problems), "reused": done, **exported, **cost}


def _cost(teacher: TeacherConfig, traces: Path) -> dict[str, float]:
    """What the samples cost at the recipe's prices, each paid once, however often the run was resumed."""
    if not isinstance(teacher, ServedTeacher):
        return {}
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = pq.read_table(traces, columns=["num_prompt_tokens", "num_tokens"])
    cost = teacher.cost(*(pc.sum(counts[name]).as_py() or 0 for name in counts.column_names))
    return {} if cost is None else {"cost": round(cost, 9)}


def _ask(teacher: Teacher, requests: list[TraceRequest], sampling: Sampling, ledger: Ledger, task: Task) -> None:
    """Ask for all `requests`; whatever ends the loop, what had arrived is in the ledger afterwards."""
    identity = teacher.identity
    waiting: list[Trace] = []
    started = flushed = time.monotonic()
    tokens = 0
    stream = teacher.generate(requests, sampling)
    try:
        for completion in stream:
            waiting.append(_trace(completion, identity, sampling))
            tokens += completion.num_tokens
            now = time.monotonic()
            if len(waiting) >= FLUSH_SAMPLES or now - flushed > FLUSH_S:
                ledger.add(waiting)
                waiting, flushed = [], now
            task.advance(1, tokens=tokens, tokens_per_s=round(tokens / max(now - started, 1e-9)))
    finally:
        ledger.add(waiting)
        if isinstance(stream, Generator):
            stream.close()  # ends the requests in flight now, not when the collector comes by


def _trace(completion: Completion, identity: TeacherIdentity, sampling: Sampling) -> Trace:
    request = completion.request
    return Trace(
        key=request.key(identity, sampling),
        problem_id=request.problem.id,
        sample_index=request.sample_index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_tokens=completion.num_tokens,
        teacher=identity.name,
    )
