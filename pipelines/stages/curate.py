"""Curate: traces to verdicts to training examples.

R/curate/verify/            the grading, a stage of its own: other filters need no new grading
R/curate/verdicts.parquet   one verdict a trace, in the order of the traces
R/curate/audit.json         what a second grader says of them, and references that no answer agrees with
R/curate/examples.parquet   what students learn from;  direct.parquet: the same questions with bare answers
R/curate/funnel.json        what each filter let through, with examples of what it did not
R/curate/dropped.parquet    every trace that is no example: key, filter, detail

Traces are read part by part, as often as it takes; of all of them at once, only what the filters remember is in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder, hub_identities, parts_of_suites
from distill.curate import (
    DroppedExamples,
    DroppedTrace,
    ExampleForm,
    GradedTrace,
    LostSamples,
    filter_traces,
    outcomes,
)
from distill.curate.mix import check_sources
from distill.errors import DataError, EnvironmentFault
from distill.ledger import Ledger
from distill.manifest import StageRun, run_stage, write_atomically
from distill.problems import load_problems, source_files
from distill.problems.benchmark import read_benchmark
from distill.progress import Progress, Task
from distill.recipe import Recipe, VerifyConfig
from distill.records import Example, Problem, Record, StageManifest, Trace, Verdict
from distill.tables import iterate_records, read_records, record_writer
from distill.teacher_facts import with_teacher_facts
from distill.verify import open_verifier
from distill.verify.audit import Audit, normal_form
from distill.verify.kept import AFTERWARDS, KeptVerdicts, grading_settings
from eval.suites import own_suites, parts_asked, suite_files
from pipelines.context import Context
from pipelines.judging import open_judge
from pipelines.preemption import preemptible

LEDGER = "ledger.sqlite"
VERDICTS, EXAMPLES, DIRECT = "verdicts.parquet", "examples.parquet", "direct.parquet"
FUNNEL, DROPPED, AUDIT = "funnel.json", "dropped.parquet", "audit.json"
PART_SIZE = 2_000
MIN_PART_TO_JUDGE = 20


class ProblemOfTrace(Record):
    """The one column of the traces that can be checked without reading them all."""

    problem_id: str


def curate(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Run the stage in `run_dir`/curate over what generation left in `run_dir`/generate.

    Raises DataError (traces that are not there or not sound, or of which none is left: the funnel and what was dropped
    are written then too), RecipeError (held-out questions that cannot be read),
    EnvironmentFault (workers that do not start, a full disk).
    """
    base_dir, progress = context.base_dir, context.progress
    out_dir = run_dir / "curate"
    inputs = _generated(run_dir)
    grading = dict(inputs)
    config: dict[str, Any] = {
        "verify": grading_settings(recipe.verify) | recipe.verify.model_dump(mode="json", include=AFTERWARDS),
        "curate": recipe.curate.model_dump(mode="json"),
        "form": {"reasoning": recipe.teacher.reasoning, "instruction": recipe.learned_instruction.words},
        "hints": recipe.generate.hints is not None,
    }
    held_out: Callable[[], dict[str, list[str]]] = dict
    if recipe.curate.decontaminate:
        held_out = held_out_questions(recipe, base_dir, inputs)
        config["eval"] = recipe.eval.asked_of_all
        config |= hub_identities(parts_asked(recipe.eval), bench_folder(recipe.bench_data, base_dir))
    stage_run = StageRun("curate", inputs, config, out_dir)
    if (done := stage_run.current()) is not None:
        return done
    prompts = held_out()
    problems = _problems(inputs)
    if recipe.curate.mix is not None:
        check_sources(recipe.curate.mix, {problem.source for problem in problems.values()})
    num_traces = _check(problems, inputs["traces"])

    def body() -> Mapping[str, Any]:
        with preemptible():
            _grade_all(problems, num_traces, grading, recipe.verify, out_dir, progress, base_dir)
            relabelled = _audit(problems, recipe.verify, out_dir)
            return _write_examples(relabelled, num_traces, inputs["traces"], recipe, prompts, out_dir, progress)

    return stage_run.run(body, (VERDICTS, AUDIT, EXAMPLES, DIRECT, FUNNEL, DROPPED))


def grade_traces(recipe: Recipe, run_dir: Path, context: Context) -> None:
    """The stage's first part alone: verdicts of all traces, where these graders have not made them. Raises as `curate`.

    What students learn from stays as it is, until `curate` runs.
    """
    inputs, out_dir = _generated(run_dir), run_dir / "curate"
    problems = _problems(inputs)
    num_traces = _check(problems, inputs["traces"])
    _grade_all(problems, num_traces, inputs, recipe.verify, out_dir, context.progress, context.base_dir)


def _generated(run_dir: Path) -> dict[str, Path]:
    inputs = {"problems": run_dir / "generate" / "problems.parquet", "traces": run_dir / "generate" / "traces"}
    for path in inputs.values():
        if not path.exists():
            raise DataError("no such file; run `potstill generate` first", where=path)
    return inputs


def _problems(inputs: Mapping[str, Path]) -> dict[str, Problem]:
    return {problem.id: problem for problem in read_records(inputs["problems"], Problem)}


def held_out_questions(recipe: Recipe, base_dir: Path, inputs: dict[str, Path]) -> Callable[[], dict[str, list[str]]]:
    """Enter the files behind the evaluation's questions into `inputs`, and return what reads them, suite by suite."""
    folder = bench_folder(recipe.bench_data, base_dir)
    inputs.update({f"suite:{name}": path for name, path in suite_files(recipe.eval.suites, folder).items()})
    own = own_suites(recipe.eval)
    files = source_files(own.values(), base_dir=base_dir, bench_data=folder)
    inputs.update({f"held_out:{name}": path for name, path in files.items()})

    def read() -> dict[str, list[str]]:
        parts = parts_of_suites(recipe.eval.suites)
        questions = {name: read_benchmark(name, split, folder, recipe.limits) for name, split in parts}
        for name, source in own.items():
            questions[name] = load_problems([source], base_dir=base_dir, limits=recipe.limits, bench_data=folder)
        return {suite: [problem.prompt for problem in of_suite] for suite, of_suite in questions.items()}

    return read


def _check(problems: Mapping[str, Problem], traces: Path) -> int:
    """The number of traces; raises DataError for a file that is none and for a trace whose problem is not there."""
    number = 0
    for number, trace in enumerate(iterate_records(traces, ProblemOfTrace), start=1):
        if trace.problem_id not in problems:
            raise DataError(
                "belongs to no problem of problems.parquet", where=f"{traces}: row {number}", field="problem_id"
            )
    return number


def _grade_all(
    problems: Mapping[str, Problem],
    num_traces: int,
    inputs: Mapping[str, Path],
    config: VerifyConfig,
    out_dir: Path,
    progress: Progress,
    base_dir: Path,
) -> None:
    """Verdicts from the nested stage `verify`: kept in the ledger as they are made; a stop loses none."""
    folder = out_dir / "verify"
    settings = grading_settings(config)

    def body() -> Mapping[str, Any]:
        traces = iterate_records(inputs["traces"], Trace)
        states: Counter[str] = Counter()
        with (
            Ledger.open(inputs["traces"].parent / LEDGER) as ledger,
            open_judge(config.judge and config.judge.teacher, base_dir, folder, progress) as judge,
            open_verifier(config, judge=judge) as verifier,
            KeptVerdicts(ledger, verifier, grading_settings(config, judge)) as kept,
            progress.task("verify", total=num_traces, unit="answers") as plain,
            with_teacher_facts(plain, judge) as task,
            record_writer(folder / VERDICTS, GradedTrace) as writer,
        ):
            while part := list(islice(traces, PART_SIZE)):
                for one in _grade(kept, part, problems, task):
                    states[one.state] += 1
                    writer.write(one)
        return {**dict(states.most_common()), "reused": kept.found}

    run_stage("verify", inputs, settings, folder, body, (VERDICTS,))


def _audit(problems: Mapping[str, Problem], config: VerifyConfig, out_dir: Path) -> Mapping[str, Problem]:
    """Write audit.json and the verdicts that the filters see; return the problems, with new references where asked."""
    made = out_dir / "verify" / VERDICTS
    audit = Audit(problems, config)
    for one in iterate_records(made, GradedTrace):
        if not one.hinted:  # told the reference, it cannot speak for it
            audit.add(one.problem_id, one.key, one.state, one.extracted)
    replaced = {suspect.problem_id: suspect for suspect in audit.suspects() if suspect.relabelled}
    with record_writer(out_dir / VERDICTS, GradedTrace) as writer:
        for one in iterate_records(made, GradedTrace):
            suspect = replaced.get(one.problem_id)
            agrees = suspect is not None and normal_form(one.extracted or "") == normal_form(suspect.majority)
            if suspect is not None and one.hinted and one.state == "correct":
                one = one.model_copy(update={"state": "wrong", "detail": "led by a reference that was replaced"})
            elif suspect is not None and one.state == "wrong" and agrees:
                detail = f"relabelled: {suspect.num_agreeing} of {suspect.num_answers} samples against the reference"
                one = one.model_copy(update={"state": "correct", "detail": detail, "relabelled": True})
            writer.write(one)
    write_atomically(out_dir / AUDIT, audit.summary().model_dump_json(indent=2) + "\n")
    new = {name: problems[name].model_copy(update={"answer": suspect.majority}) for name, suspect in replaced.items()}
    return {**problems, **new}


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


def _write_examples(
    problems: Mapping[str, Problem],
    num_traces: int,
    traces: Path,
    recipe: Recipe,
    held_out: Mapping[str, list[str]],
    out_dir: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    def graded() -> Iterator[tuple[Trace, Verdict]]:
        verdicts = iterate_records(out_dir / VERDICTS, GradedTrace)
        with progress.task("curate", total=num_traces, unit="traces") as task:
            for trace, one in zip(iterate_records(traces, Trace), verdicts, strict=True):
                yield trace, one.verdict
                task.advance(1)

    form = ExampleForm(recipe.teacher.reasoning, recipe.learned_instruction)
    hints = recipe.generate.hints is not None
    filtered = filter_traces(problems, graded, recipe.curate, held_out, form.reasoning, hints=hints)
    shown, lost = DroppedExamples(), LostSamples(form.reasoning)
    num_hinted = 0
    with (
        record_writer(out_dir / EXAMPLES, Example) as examples,
        record_writer(out_dir / DIRECT, Example) as direct,
        record_writer(out_dir / DROPPED, DroppedTrace) as dropped,
    ):
        for candidate, one in outcomes(problems, graded(), filtered.dropped, form):
            if isinstance(one, DroppedTrace):
                dropped.write(one)
                shown.add(candidate, one)
                if not filtered.num_kept:
                    lost.add(candidate, one)
            else:
                (direct if one.trace_key is None else examples).write(one)
                num_hinted += one.hinted
    relabelled = sum(one.relabelled for one in iterate_records(out_dir / VERDICTS, GradedTrace))
    hinted = sum(one.hinted for one in iterate_records(out_dir / VERDICTS, GradedTrace))
    marks = {name: count for name, count in (("relabelled", relabelled), ("hinted", hinted)) if count}
    funnel = [{**step, **marks} if step["filter"] == "verdict" else step for step in filtered.funnel]
    write_atomically(out_dir / FUNNEL, json.dumps(shown.beside(funnel), indent=2) + "\n")
    if not filtered.num_kept:
        raise DataError(f"no trace is left: {lost.summary()}", where=out_dir / FUNNEL)
    counts = {"traces": num_traces, "examples": examples.count, "questions": direct.count}
    told = {"hinted": num_hinted} if hints else {}  # examples
    return {**counts, **({"relabelled": relabelled} if relabelled else {}), **told, "funnel": funnel}
