"""Curate: traces to verdicts to training examples.

R/curate/verify/            the grading, a stage of its own: other filters need no new grading
R/curate/verdicts.parquet   one verdict a trace, in the order of the traces
R/curate/examples.parquet   what students learn from;  direct.parquet: the same questions with bare answers
R/curate/funnel.json        what each filter let through;  dropped.parquet: what it did not, and why
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.curate import Dropped, GradedTrace, sift
from distill.errors import DataError, EnvironmentFault
from distill.ledger import Ledger
from distill.manifest import is_current, read_manifest, run_stage, write_atomically
from distill.problems import load_problems, source_files
from distill.progress import Progress, Task
from distill.recipe import Recipe, VerifyConfig
from distill.records import Example, Problem, StageManifest, Trace
from distill.tables import read_records, write_records
from distill.verify import open_verifier
from distill.verify.kept import KeptVerdicts, grading_settings
from pipelines.preemption import preemptible

LEDGER = "ledger.sqlite"
VERDICTS, EXAMPLES, DIRECT = "verdicts.parquet", "examples.parquet", "direct.parquet"
FUNNEL, DROPPED = "funnel.json", "dropped.parquet"
PART_SIZE = 2_000
MIN_PART_TO_JUDGE = 20


def curate(recipe: Recipe, run_dir: Path, *, progress: Progress, base_dir: Path | None = None) -> StageManifest:
    """Run the stage in `run_dir`/curate over what generation left in `run_dir`/generate.

    Raises DataError (traces that are not there or not sound), RecipeError (held-out questions that cannot be read),
    EnvironmentFault (workers that do not start, a full disk).
    """
    base_dir = base_dir or Path.cwd()
    out_dir = run_dir / "curate"
    inputs = {name: run_dir / "generate" / f"{name}.parquet" for name in ("problems", "traces")}
    for path in inputs.values():
        if not path.is_file():
            raise DataError("no such file; run `potstill generate` first", where=path)
    grading = dict(inputs)
    config: dict[str, Any] = {
        "verify": grading_settings(recipe.verify),
        "curate": recipe.curate.model_dump(mode="json"),
    }
    held_out: Callable[[], list[str]] = list
    if recipe.curate.decontaminate:
        held_out = _held_out(recipe, base_dir, inputs)
        config["eval"] = recipe.eval.model_dump(mode="json", include={"suites", "held_out"})
    if is_current("curate", inputs, config, out_dir):
        done = read_manifest(out_dir)
        assert done is not None
        return done
    prompts = held_out()
    problems, traces = read_records(inputs["problems"], Problem), read_records(inputs["traces"], Trace)
    _check(problems, traces, inputs["traces"])

    def body() -> Mapping[str, Any]:
        with preemptible():
            graded = _graded(problems, traces, grading, recipe.verify, out_dir, progress)
            return _curated(problems, traces, graded, recipe, prompts, out_dir)

    return run_stage("curate", inputs, config, out_dir, body, (VERDICTS, EXAMPLES, DIRECT, FUNNEL, DROPPED))


def _held_out(recipe: Recipe, base_dir: Path, inputs: dict[str, Path]) -> Callable[[], list[str]]:
    """Enter the files behind the evaluation's questions into `inputs`, and return what reads the questions."""
    from eval.suites import BENCHMARKS, bench_folder, read_benchmark

    benchmarks = [name for name in recipe.eval.suites if name in BENCHMARKS]
    folder = bench_folder(recipe.eval.bench_data) if benchmarks else base_dir
    for name in benchmarks:
        path = folder / BENCHMARKS[name][0]
        if not path.is_file():
            raise DataError(f"missing benchmark file of suite {name!r}", where=path)
        inputs[f"suite:{name}"] = path
    own = [recipe.eval.held_out] if recipe.eval.held_out is not None else []
    inputs.update({f"held_out:{name}": path for name, path in source_files(own, base_dir=base_dir).items()})

    def read() -> list[str]:
        questions = load_problems(own, base_dir=base_dir)
        questions += [problem for name in benchmarks for problem in read_benchmark(name, folder)]
        return [problem.prompt for problem in questions]

    return read


def _check(problems: list[Problem], traces: list[Trace], where: Path) -> None:
    known = {problem.id for problem in problems}
    for number, trace in enumerate(traces, start=1):
        if trace.problem_id not in known:
            raise DataError(
                "belongs to no problem of problems.parquet", where=f"{where}: row {number}", field="problem_id"
            )


def _graded(
    problems: list[Problem],
    traces: list[Trace],
    inputs: Mapping[str, Path],
    config: VerifyConfig,
    out_dir: Path,
    progress: Progress,
) -> list[GradedTrace]:
    """Verdicts from the nested stage `verify`: kept in the ledger as they are made; a stop loses none."""
    folder = out_dir / "verify"
    settings = grading_settings(config)

    def body() -> Mapping[str, Any]:
        by_id = {problem.id: problem for problem in problems}
        graded: list[GradedTrace] = []
        with (
            Ledger.open(inputs["traces"].parent / LEDGER) as ledger,
            open_verifier(config) as verifier,
            KeptVerdicts(ledger, verifier, settings) as kept,
            progress.task("verify", total=len(traces), unit="answers") as task,
        ):
            for start in range(0, len(traces), PART_SIZE):
                graded += _grade(kept, traces[start : start + PART_SIZE], by_id, task)
        write_records(folder / VERDICTS, graded, GradedTrace)
        return {**_states(graded), "reused": kept.found}

    run_stage("verify", inputs, settings, folder, body, (VERDICTS,))
    write_atomically(out_dir / VERDICTS, (folder / VERDICTS).read_bytes())
    return read_records(out_dir / VERDICTS, GradedTrace)


def _grade(kept: KeptVerdicts, traces: list[Trace], problems: Mapping[str, Problem], task: Task) -> list[GradedTrace]:
    answers = [(problems[trace.problem_id], trace) for trace in traces]
    graded = []
    for trace, verdict in zip(traces, kept.grade(answers), strict=True):
        graded.append(
            GradedTrace(
                key=trace.key,
                problem_id=trace.problem_id,
                sample_index=trace.sample_index,
                state=verdict.state,
                extracted=verdict.extracted,
                detail=verdict.detail,
            )
        )
        task.advance(1)
    failed = [one for one in graded if one.state == "infra_error"]
    if len(graded) >= MIN_PART_TO_JUDGE and 2 * len(failed) > len(graded):
        raise EnvironmentFault(
            f"grading fails for {len(failed)} of {len(graded)} answers ({failed[0].detail})", where="verify"
        )
    return graded


def _curated(
    problems: list[Problem],
    traces: list[Trace],
    graded: list[GradedTrace],
    recipe: Recipe,
    held_out_prompts: list[str],
    out_dir: Path,
) -> Mapping[str, Any]:
    verdicts = [one.verdict for one in graded]
    curated = sift(problems, traces, verdicts, recipe.curate, held_out_prompts)
    if not curated.examples:
        last = next((step for step in curated.funnel if not step["out"]), {"filter": "generate"})
        raise DataError(f"no trace is left after the filter {last['filter']!r}: {_states(graded)}", where=out_dir)
    write_records(out_dir / EXAMPLES, curated.examples, Example)
    write_records(out_dir / DIRECT, curated.direct_examples, Example)
    write_records(out_dir / DROPPED, curated.dropped, Dropped)
    write_atomically(out_dir / FUNNEL, json.dumps(curated.funnel, indent=2) + "\n")
    return {"traces": len(traces), "examples": len(curated.examples), "questions": len(curated.direct_examples)}


def _states(graded: list[GradedTrace]) -> dict[str, int]:
    return dict(Counter(one.state for one in graded).most_common())
