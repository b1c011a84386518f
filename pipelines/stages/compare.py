"""The compare stage: all scores of a run together, every suite, as a report and files beside it.

run_dir/report/{index.html, traces/*.html, *.png, summary.json, summary.md, scores.csv, manifest.json}
run_dir/report/contamination/   which questions of the suites are in the training sets, a stage of its own
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill import decontaminate, words
from distill.device import device_name
from distill.errors import DataError
from distill.manifest import MANIFEST, peak_rss_bytes, run_stage, write_atomically
from distill.progress import Progress
from distill.recipe import Recipe
from distill.records import StageManifest, content_id
from eval import contamination, report
from eval.compare import Comparison, compare_run
from eval.contamination import Contamination, find_leaks, questions_of
from eval.harness import SAMPLES, SCORES
from eval.training_curves import LOG
from pipelines.context import Context
from pipelines.stages.distill import EXAMPLES

# What decides how a report looks; a change of any of them writes the report again.
SOURCES = (
    "templates",
    "training_curves.py",
    *(f"{name}.py" for name in ("across", "bootstrap", "charts", "compare", "conditions", "contamination", "curation")),
    *(f"{name}.py" for name in ("figures", "leaks", "page", "power", "report", "scored", "sizes", "statistics")),
    *(f"{name}.py" for name in ("summary", "table", "tradeoffs", "traces")),
)
LEAKS = "contamination"
FINDINGS = "findings.json"
# What decides which questions count as found.
LEAK_SOURCES = (Path(decontaminate.__file__), Path(words.__file__), Path(contamination.__file__))


def compare(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Write the report of what has been scored. Raises DataError where nothing has."""
    config = {
        "name": recipe.name,
        "deciding_suite": recipe.deciding_suite,
        "min_containment": recipe.curate.min_containment,
        "price_per_hour": recipe.eval.price_per_hour,
    }

    def read() -> Comparison:
        comparison = compare_run(run_dir, recipe.deciding_suite, context.progress)
        found = contamination_of(comparison, recipe, run_dir, run_dir / "report" / LEAKS, context.progress)
        return replace(comparison, contamination=found, price_per_hour=recipe.eval.price_per_hour)

    return write_comparison("compare", read, inputs_of(run_dir), config, run_dir / "report", context.progress)


def inputs_of(run_dir: Path) -> dict[str, Path]:
    """The files of a run that its report is made of. Raises DataError where nothing has been scored."""
    folders = sorted(path.parent for path in (run_dir / "eval").glob(f"*/{SCORES}"))
    if not folders:
        raise DataError("holds no scores: run eval first", where=run_dir / "eval")
    inputs = {f"{folder.name}/{name}": folder / name for folder in folders for name in (SCORES, SAMPLES)}
    manifests = [run_dir / name / MANIFEST for name in ("generate", "curate", "distill", "eval")]
    inputs |= {f"stage:{path.parent.name}": path for path in manifests if path.exists()}
    for name in ("funnel", "audit"):
        path = run_dir / "curate" / f"{name}.json"
        if path.exists():
            inputs[name] = path
    inputs |= {f"log:{path.parent.name}": path for path in (run_dir / "distill").glob(f"*/{LOG}")}
    return inputs | {f"training:{name}": path for name, path in training_files(run_dir).items()}


def write_comparison(
    stage: str,
    read: Callable[[], Comparison],
    inputs: Mapping[str, Path],
    config: Mapping[str, Any],
    out_dir: Path,
    progress: Progress,
) -> StageManifest:
    """Run the stage that writes the report of what `read` returns into `out_dir`."""
    code = {f"code:{name}": Path(report.__file__).parent / name for name in SOURCES}
    outputs: list[str] = []

    def body() -> Mapping[str, Any]:
        started = time.monotonic()
        comparison = read()
        outputs.extend(
            report.write_report(
                comparison,
                out_dir,
                elapsed_s=lambda: time.monotonic() - started,
                peak_rss_bytes=peak_rss_bytes,
                device=device_name(),
                progress=progress,
            )
        )
        return {
            "models": len(comparison.models),
            "students": len(comparison.students),
            "suites": len(comparison.suites),
            "size": {suite.name: suite.size_verdict for suite in comparison.suites},
        }

    return run_stage(stage, {**inputs, **code}, config, out_dir, body, outputs)


def training_files(run_dir: Path) -> dict[str, Path]:
    """What students of each method learned from, where it is still there."""
    paths = {method: run_dir / "curate" / name for method, name in EXAMPLES.items()}
    return {method: path for method, path in paths.items() if path.exists()}


def contamination_of(
    comparison: Comparison, recipe: Recipe, run_dir: Path, out_dir: Path, progress: Progress
) -> Contamination | None:
    """The suites' questions that a run's students were trained on, by the run's own threshold; kept in `out_dir`."""
    sets: dict[str, tuple[Path, Sequence[str]]] = {}
    for method, path in training_files(run_dir).items():
        students = [model.name for model in comparison.models if model.role == method]
        if students:
            sets[method] = (path, students)
    if not sets:
        return None
    questions = questions_of(comparison.models, progress)
    problems = run_dir / "generate" / "problems.parquet"
    inputs = {f"training:{name}": path for name, (path, _) in sets.items()}
    inputs |= {"problems": problems} if problems.exists() else {}
    inputs |= {f"code:{path.name}": path for path in LEAK_SOURCES}
    config = {
        "questions": content_id([[*where, text] for where, text in questions.items()]),
        "students": {name: list(students) for name, (_, students) in sets.items()},
        "min_containment": recipe.curate.min_containment,
    }

    def body() -> Mapping[str, Any]:
        found = find_leaks(questions, sets, problems, min_containment=recipe.curate.min_containment, progress=progress)
        write_atomically(out_dir / FINDINGS, found.model_dump_json(indent=1) + "\n")
        return {"questions": len(questions), "found": len(found.leaked)}

    run_stage(LEAKS, inputs, config, out_dir, body, [FINDINGS])
    return Contamination.model_validate_json((out_dir / FINDINGS).read_bytes())
