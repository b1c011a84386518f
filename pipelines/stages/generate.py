"""Generate: problems and a teacher to traces, every sample once.

    R/generate/ledger.sqlite      each sample as soon as it is there; survives whatever happens
    R/generate/problems.parquet   the questions, in the order of the recipe
    R/generate/traces/            the samples of these questions, by question and sample index, in Parquet shards

Only samples that the ledger does not have are asked for, so an interrupted run goes on where it stopped, and a recipe
that asks for sixteen samples where it asked for four asks for twelve. Millions of samples are planned without an object
each (`distill.wanted`), asked for in rounds (`pipelines.rounds`) and published in shards (`distill.export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.benchmarks import bench_folder, hub_identities
from distill.bundled import locate
from distill.errors import CheckpointError, DataError, RecipeError
from distill.export import export_traces
from distill.gguf import checkpoint_folder
from distill.ledger import Ledger
from distill.manifest import StageRun
from distill.problems import benchmark_parts, iterate_problems, source_files
from distill.problems.packed import PackedProblems
from distill.protocols import Teacher
from distill.recipe import NativeTeacher, Recipe, ServedTeacher, TeacherConfig, VllmServing
from distill.records import Problem, StageManifest
from distill.tables import write_records
from distill.verify.kept import grading_settings
from pipelines.context import Context, OpenTeacher
from pipelines.judging import open_judge
from pipelines.preemption import preemptible
from pipelines.rounds import Rounds
from pipelines.run_folder import check_writable

LEDGER, PROBLEMS, TRACES = "ledger.sqlite", "problems.parquet", "traces"


def generate(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Run the stage in `run_dir`/generate.

    Raises RecipeError, DataError or CheckpointError before anything is written; EnvironmentFault, Preempted or
    KeyboardInterrupt with all finished samples in the ledger.
    """
    base_dir, out_dir = context.base_dir, run_dir / "generate"
    bench_data = bench_folder(recipe.bench_data, base_dir)
    inputs = source_files(recipe.problems, base_dir=base_dir, bench_data=bench_data)
    if isinstance(recipe.teacher, NativeTeacher):
        inputs["teacher"] = _checkpoint_folder(locate(recipe.teacher.model, base_dir))
    elif isinstance(recipe.teacher, VllmServing) and (model := locate(recipe.teacher.model, base_dir)).exists():
        inputs["teacher"] = model
    config = _what_matters(recipe) | hub_identities(benchmark_parts(recipe.problems), bench_data)
    stage_run = StageRun("generate", inputs, config, out_dir)
    if (done := stage_run.current()) is not None:
        return done
    problems = _problems(recipe, base_dir, bench_data)
    if recipe.generate.special_tokens_in_text == "refuse":
        _refuse_special_tokens(problems, inputs.get("teacher"))
    check_writable(out_dir)
    if (out_dir / LEDGER).exists():  # held, read-only or damaged: that shows now, not when the weights have been read
        Ledger.open(out_dir / LEDGER).close()
    teacher = (context.open_teacher or _backend(context, out_dir))(recipe.teacher)
    try:
        return stage_run.run(lambda: _body(problems, teacher, recipe, out_dir, context), (PROBLEMS, TRACES))
    finally:
        teacher.close()


def _what_matters(recipe: Recipe) -> dict[str, Any]:
    matters: dict[str, Any] = {
        "problems": [source.model_dump(mode="json") for source in recipe.problems],
        "teacher": recipe.teacher.identity(),
        "generate": recipe.generate.model_dump(mode="json", exclude={"grade"}),
    }
    if recipe.generate.adaptive is not None:
        matters["verify"] = grading_settings(recipe.verify)  # verdicts decide how many samples there are
    return matters


def _checkpoint_folder(path: Path) -> Path:
    folder = checkpoint_folder(path)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", where=path, field="teacher.model")
    return folder


def _backend(context: Context, log_dir: Path) -> OpenTeacher:
    from teacher.backends import open_teacher  # may bring torch in

    def open_backend(config: TeacherConfig) -> Teacher:
        base_dir, progress = context.base_dir, context.progress
        with progress.task("load the teacher", None):
            teacher: Teacher = open_teacher(config, base_dir=base_dir, log_dir=log_dir, progress=progress)
        return teacher

    return open_backend


def _problems(recipe: Recipe, base_dir: Path, bench_data: Path | None) -> PackedProblems:
    """The recipe's problems, or this machine's part of them: a problem's own id says which part it belongs to."""
    problems = iterate_problems(recipe.problems, base_dir=base_dir, limits=recipe.limits, bench_data=bench_data)
    if recipe.generate.part is None:
        return PackedProblems(problems)
    number, count = map(int, recipe.generate.part.split("/"))
    return PackedProblems(problem for problem in problems if int(problem.id, 16) % count == number - 1)


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
        # Only adaptive sampling needs a judge here: elsewhere curation asks it.
        verify = recipe.verify if recipe.generate.adaptive else recipe.verify.model_copy(update={"judge": None})
        with open_judge(verify, context.base_dir, out_dir, progress) as judge:
            rounds.ask(judge)
        with progress.task("export", total=len(rounds.wanted), unit="samples") as task:
            exported = export_traces(ledger, rounds.wanted.keys, out_dir / TRACES, task)
    cost = _cost(recipe.teacher, out_dir / TRACES)
    return {**rounds.counts(), **exported, **cost, "identity": teacher.identity.model_dump()}


def _cost(teacher: TeacherConfig, traces: Path) -> dict[str, float]:
    """The cost of the samples at the recipe's prices, each paid once, however often the run was resumed."""
    if not isinstance(teacher, ServedTeacher):
        return {}
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = pq.read_table(traces, columns=["num_prompt_tokens", "num_tokens"])
    cost = teacher.cost(*(pc.sum(counts[name]).as_py() or 0 for name in counts.column_names))
    return {} if cost is None else {"cost": round(cost, 9)}
