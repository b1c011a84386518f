"""Push traces: what the teacher wrote, as a data set of the Hugging Face Hub.

R/push-traces/layout/dataset/   the data set as it is uploaded: Parquet shards and README.md; loads from here as well
R/push-traces/manifest.json     repository, commit, and the name and size of every file

The layout is a stage of its own: a push that the network breaks off does not write it again, and a dry run ends there.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.benchmarks import BENCHMARKS
from distill.bundled import locate
from distill.curate import DroppedTrace, GradedTrace
from distill.errors import DataError, RecipeError, nearest
from distill.manifest import read_manifest, run_stage, write_atomically
from distill.problems import benchmark_parts
from distill.progress import Progress
from distill.publish.hub import check_name, push_folder
from distill.publish.origin import published_name
from distill.publish.synthesised import question_funnels
from distill.publish.trace_card import Provenance, dataset_card
from distill.publish.traces import FOLDERS, DatasetLayout, lay_out, pair_with_drops
from distill.recipe import Recipe
from distill.records import Problem, StageManifest, Trace, Verdict
from distill.tables import iterate_records, read_records
from pipelines.context import Context

DATASET = "dataset"
README = "README.md"


def push_traces(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Lay the data set out and push it. A dry run pushes nothing: its manifest only says what would go.

    Raises RecipeError for a repository name or a source that there is not, DataError where curation has not run,
    EnvironmentFault for a full disk, a Hub that refuses or is not reached.
    """
    settings = recipe.push_traces
    repo = settings.repo.replace("{recipe}", recipe.name)
    check_name(repo, field="push_traces.repo")
    out_dir = run_dir / "push-traces"
    layout = _layout(recipe, repo, run_dir, out_dir / "layout", context)
    folder = out_dir / "layout" / DATASET
    files = tree(folder)
    config = {"push_traces": settings.model_dump(mode="json"), "repo": repo}
    counts = {
        **{name: layout.counts[name] for name in ("traces", "examples")},
        "repo": repo,
        "private": settings.private,
        "files": len(files),
        "bytes": sum(files.values()),
        "tree": files,
    }
    if context.dry_run:
        return layout.model_copy(
            update={
                "stage": "push_traces",
                "config": config,
                "counts": {**counts, "folder": str(folder)},
                "outputs": {},
            }
        )

    def body() -> Mapping[str, Any]:
        with context.progress.task(f"push {repo}", 1, unit="commits") as task:
            done = push_folder(
                folder,
                repo,
                repo_type="dataset",
                private=settings.private,
                message=f"Traces of {layout.counts['identity']['name']} by the recipe {recipe.name}",
                replace=[f"{name}/*.parquet" for name in FOLDERS.values()],
            )
            task.advance(1)
        return {**counts, "repo": done.repo_id, "url": done.url, "commit": done.commit}

    return run_stage("push_traces", {DATASET: folder}, config, out_dir, body, ())


def tree(folder: Path) -> dict[str, int]:
    """Path and size in bytes of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _layout(recipe: Recipe, repo: str, run_dir: Path, out_dir: Path, context: Context) -> StageManifest:
    inputs = {
        "problems": run_dir / "generate" / "problems.parquet",
        "traces": run_dir / "generate" / "traces",
        **{name: run_dir / "curate" / f"{name}.parquet" for name in ("verdicts", "dropped")},
        "funnel": run_dir / "curate" / "funnel.json",
    }
    generated, curated = read_manifest(run_dir / "generate"), read_manifest(run_dir / "curate")
    if generated is None or curated is None:
        raise DataError("not there yet; run `potstill distill` with this recipe first", where=run_dir / "curate")
    provenance = _provenance(recipe, generated, curated, context.base_dir)
    settings = recipe.push_traces.model_dump(mode="json", exclude={"private"})
    # The card tells where the traces come from: it is written anew when that changes, not only when they do.
    config = {"push_traces": settings, "repo": repo, "provenance": {**vars(provenance)}}

    def body() -> Mapping[str, Any]:
        problems = {problem.id: problem for problem in read_records(inputs["problems"], Problem)}
        _check_licences(recipe.push_traces.licences, {problem.source for problem in problems.values()})
        shutil.rmtree(out_dir / DATASET, ignore_errors=True)
        layout = _lay_out(recipe, problems, inputs, curated.counts["traces"], out_dir / DATASET, context.progress)
        card = dataset_card(
            repo, layout, provenance, licence=recipe.push_traces.licence, language=recipe.push_traces.language
        )
        write_atomically(out_dir / DATASET / README, card)
        num_traces = sum(count.num_traces for count in layout.sources.values())
        return {"traces": num_traces, "examples": layout.num_rows["default"], "identity": dict(provenance.identity)}

    return run_stage("push_traces_layout", inputs, config, out_dir, body, (DATASET,))


def _lay_out(
    recipe: Recipe,
    problems: Mapping[str, Problem],
    inputs: Mapping[str, Path],
    num_traces: int,
    folder: Path,
    progress: Progress,
) -> DatasetLayout:
    def samples() -> Iterator[tuple[Problem, Trace, Verdict]]:
        verdicts = iterate_records(inputs["verdicts"], GradedTrace)
        with progress.task("lay out", total=num_traces, unit="traces") as task:
            for trace, graded in zip(iterate_records(inputs["traces"], Trace), verdicts, strict=True):
                yield problems[trace.problem_id], trace, graded.verdict
                task.advance(1)

    return lay_out(
        pair_with_drops(samples(), iterate_records(inputs["dropped"], DroppedTrace)),
        folder,
        licences=_licences_of_benchmarks(recipe) | recipe.push_traces.licences,
        include_rejected=recipe.push_traces.include_rejected,
        shard_bytes=recipe.push_traces.shard_mb * 1_000_000,
    )


def _licences_of_benchmarks(recipe: Recipe) -> dict[str, str]:
    return {name: BENCHMARKS[name].licence for name, _ in benchmark_parts(recipe.problems)}


def _check_licences(licences: Mapping[str, str], sources: Collection[str]) -> None:
    for name in sorted(licences.keys() - set(sources)):
        message = f"{name!r} is no source of the problems; {nearest(name, sources)}"
        raise RecipeError(message, where="recipe", field="push_traces.licences")


def _num_samples(recipe: Recipe, generated: StageManifest) -> str:
    """`4`, or `4 to 16` where problems were given as many as they were worth."""
    numbers = sorted(map(int, generated.counts.get("samples_per_problem", {}))) or [recipe.generate.num_samples]
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _without_path(identity: Mapping[str, str], recipe: Recipe, base_dir: Path) -> dict[str, str]:
    """An endpoint may serve its model under the path that it has there."""
    model = recipe.teacher.model
    published = published_name(model, locate(model, base_dir)).replace("`", "")
    return {name: value.replace(model, published) for name, value in identity.items()}


def _provenance(recipe: Recipe, generated: StageManifest, curated: StageManifest, base_dir: Path) -> Provenance:
    versions = {**generated.versions, **curated.versions}
    return Provenance(
        recipe=recipe.name,
        identity=_without_path(generated.counts.get("identity", {"name": recipe.teacher.model}), recipe, base_dir),
        sampling=recipe.generate.sampling.content(),
        num_samples=_num_samples(recipe, generated),
        system_prompt=recipe.teacher.system_prompt,
        prompt_suffix=recipe.teacher.prompt_suffix,
        reasoning=recipe.teacher.reasoning,
        funnel=curated.counts["funnel"],
        questions=question_funnels(generated),
        suites=[*recipe.eval.suites] if recipe.curate.decontaminate else [],
        hashes={
            **{name: digest for name, digest in generated.inputs.items() if name == "teacher"},
            **{name: digest for name, digest in generated.outputs.items() if name != "ledger.sqlite"},
            **{name: digest for name, digest in curated.outputs.items() if name.endswith(".parquet")},
        },
        versions={name: version for name, version in versions.items() if version[:1].isdigit()},
    )
