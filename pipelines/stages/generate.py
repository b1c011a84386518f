"""Generate: problems and a teacher to traces, every sample once.

    R/generate/ledger.sqlite      each sample as soon as it is there; survives whatever happens
    R/generate/problems.parquet   the questions, in the order of the recipe
    R/generate/traces/            the samples of these questions, by question and sample index, in Parquet shards;
                                  behind them those that were asked with a hint
    R/generate/questions/NAME/    the questions of a synthesised source (`pipelines.synthesis`)

Only samples that the ledger does not have are asked for, so an interrupted run goes on where it stopped, and a recipe
that asks for sixteen samples where it asked for four asks for twelve. Millions of samples are planned without an object
each (`distill.wanted`), asked for in rounds (`pipelines.rounds`) and published in shards (`distill.export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder, hub_identities
from distill.errors import DataError, RecipeError
from distill.export import export_traces
from distill.ledger import Ledger
from distill.manifest import StageRun, read_manifest
from distill.problems import benchmark_parts, given_sources, iterate_problems, source_files
from distill.problems.packed import PackedProblems
from distill.protocols import Teacher
from distill.recipe import GivenSource, Recipe, ServedTeacher, SynthesisedSource, TeacherConfig
from distill.records import Problem, StageManifest
from distill.synthesis import PROMPTS_ID
from distill.tables import iterate_records, write_records
from distill.verify.kept import grading_settings
from eval.suites import parts_asked
from pipelines.context import Context, OpenTeacher
from pipelines.hints import SecondTries, all_keys
from pipelines.judging import open_judge
from pipelines.preemption import preemptible
from pipelines.rounds import Rounds
from pipelines.run_folder import check_writable
from pipelines.stages.curate import held_out_questions
from pipelines.synthesis import PROBLEMS, QUESTIONS, synthesise
from pipelines.teachers import teacher_folder, teacher_opener

LEDGER, TRACES = "ledger.sqlite", "traces"


def generate(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Run the stage in `run_dir`/generate.

    Raises RecipeError, DataError or CheckpointError before anything is written; EnvironmentFault, Preempted or
    KeyboardInterrupt with all finished samples in the ledger.
    """
    base_dir, out_dir = context.base_dir, run_dir / "generate"
    bench_data = bench_folder(recipe.bench_data, base_dir)
    inputs = source_files(recipe.problems, base_dir=base_dir, bench_data=bench_data)
    parts = benchmark_parts(recipe.problems)
    if recipe.synthesised:  # a question of the evaluation is not to be written
        held_out_questions(recipe, base_dir, inputs)
        parts += parts_asked(recipe.eval)
    if (folder := teacher_folder(recipe.teacher, base_dir)) is not None:
        inputs["teacher"] = folder
    config = _what_matters(recipe) | hub_identities(parts, bench_data)
    stage_run = StageRun("generate", inputs, config, out_dir)
    if (done := stage_run.current()) is not None:
        return done
    given = _given(given_sources(recipe.problems), recipe, base_dir)
    problems = PackedProblems(_of_part(given, recipe.generate.part))  # seeds among them, until there are questions
    if recipe.generate.special_tokens_in_text == "refuse":
        _refuse_special_tokens(problems, inputs.get("teacher"))
    check_writable(out_dir)
    if (out_dir / LEDGER).exists():  # held, read-only or damaged: that shows now, not when the weights have been read
        Ledger.open(out_dir / LEDGER).close()
    open_teacher = teacher_opener(context, out_dir)
    for source in recipe.synthesised:
        if source.teacher is not None:  # which is gone before the recipe's comes
            synthesise(source, recipe, out_dir, context, partial(_opened, open_teacher, source.teacher))
    with closing(open_teacher(recipe.teacher)) as teacher:
        for source in recipe.synthesised:
            if source.teacher is None:
                synthesise(source, recipe, out_dir, context, lambda: nullcontext(teacher))
        if recipe.synthesised:
            problems = PackedProblems(_all_problems(recipe, out_dir, base_dir))
        return stage_run.run(lambda: _body(problems, teacher, recipe, out_dir, context), (PROBLEMS, TRACES))


def _what_matters(recipe: Recipe) -> dict[str, Any]:
    matters: dict[str, Any] = {
        "problems": [source.model_dump(mode="json") for source in recipe.problems],
        "teacher": recipe.teacher.identity(),
        "generate": recipe.generate.model_dump(mode="json", exclude={"grade"}),
    }
    if recipe.generate.adaptive is not None or recipe.generate.hints is not None:
        matters["verify"] = grading_settings(recipe.verify)  # verdicts decide how many samples there are
    if recipe.generate.hints is not None or recipe.synthesised:
        matters["prompts"] = PROMPTS_ID
    if recipe.synthesised:  # decided by answers that agree, and by what is held out
        matters["verify"] = grading_settings(recipe.verify)
        matters["curate"] = recipe.curate.model_dump(mode="json", include={"min_containment"})
        matters["eval"] = recipe.eval.asked_of_all
    return matters


def _opened(open_teacher: OpenTeacher, config: TeacherConfig) -> closing[Teacher]:
    return closing(open_teacher(config))


def _all_problems(recipe: Recipe, out_dir: Path, base_dir: Path) -> Iterator[Problem]:
    for source in recipe.problems:
        if isinstance(source, SynthesisedSource):
            yield from iterate_records(out_dir / QUESTIONS / source.name / PROBLEMS, Problem)
        else:
            yield from _given([source], recipe, base_dir)


def _given(sources: Iterable[GivenSource], recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    folder = bench_folder(recipe.bench_data, base_dir)
    return iterate_problems(sources, base_dir=base_dir, limits=recipe.limits, bench_data=folder)


def _of_part(problems: Iterable[Problem], part: str | None) -> Iterable[Problem]:
    """This machine's part of the problems: a problem's own id says which one it belongs to."""
    if part is None:
        return problems
    number, count = map(int, part.split("/"))
    return (problem for problem in problems if int(problem.id, 16) % count == number - 1)


def _refuse_special_tokens(problems: Iterable[Problem], folder: Path | None) -> None:
    """Raise DataError for the first question that spells out a special token of the teacher in `folder`."""
    field = "generate.special_tokens_in_text"
    if folder is None:
        raise RecipeError(
            "refuse: needs a teacher whose folder is here, for its tokenizer", where="recipe", field=field
        )
    from distill.special_tokens import special_tokens
    from teacher.backends.tokenizer import load_tokenizer
    from teacher.models.load import read_facts

    specials = special_tokens(load_tokenizer(folder, read_facts(folder)))
    for problem in problems:
        if (name := specials.first_in(problem.prompt)) is not None:
            message = f"spells out the special token {name!r}, which {field} refuses"
            raise DataError(message, where=problem.source, field=f"prompt {problem.prompt[:40]!r}")


def _body(
    problems: PackedProblems, teacher: Teacher, recipe: Recipe, out_dir: Path, context: Context
) -> Mapping[str, Any]:
    progress = context.progress
    with preemptible(), Ledger.open(out_dir / LEDGER) as ledger:
        for path in [*out_dir.glob(f".{PROBLEMS}.*.tmp"), *out_dir.glob(f".{TRACES}.*.tmp")]:
            path.unlink()  # a killed run's: this process alone writes here now
        write_records(out_dir / PROBLEMS, problems, Problem)
        rounds = Rounds(problems, teacher, recipe, ledger, progress)
        tries = SecondTries(rounds, teacher, recipe, ledger, progress)
        # Adaptive sampling and hints alone need a judge here: elsewhere curation asks it.
        graded = recipe.generate.adaptive is not None or recipe.generate.hints is not None
        verify = recipe.verify if graded else recipe.verify.model_copy(update={"judge": None})
        with open_judge(verify.judge and verify.judge.teacher, context.base_dir, out_dir, progress) as judge:
            rounds.ask(judge)
            tries.ask(judge)
        total = len(rounds.wanted) + tries.counts().get("hinted", 0)
        with progress.task("export", total=total, unit="samples") as task:
            exported = export_traces(ledger, lambda: all_keys(rounds, tries), out_dir / TRACES, task)
    cost = _cost(recipe.teacher, out_dir / TRACES)
    synthesised = {source.name: _synthesised(out_dir / QUESTIONS / source.name) for source in recipe.synthesised}
    written = {"synthesised": synthesised} if synthesised else {}
    identity = teacher.identity.model_dump()
    return {**rounds.counts(), **tries.counts(), **exported, **cost, **written, "identity": identity}


def _synthesised(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None, "the stage is complete"
    return manifest.counts


def _cost(teacher: TeacherConfig, traces: Path) -> dict[str, float]:
    """The cost of the samples at the recipe's prices, each paid once, however often the run was resumed."""
    if not isinstance(teacher, ServedTeacher):
        return {}
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = pq.read_table(traces, columns=["num_prompt_tokens", "num_tokens"])
    cost = teacher.cost(*(pc.sum(counts[name]).as_py() or 0 for name in counts.column_names))
    return {} if cost is None else {"cost": round(cost, 9)}
