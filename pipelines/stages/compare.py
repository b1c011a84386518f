"""The compare stage: all scores of a run together, every suite, as a report and files beside it.

run_dir/report/{index.html, traces/*.html, *.png, summary.json, summary.md, scores.csv, manifest.json}
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.device import device_name
from distill.errors import DataError
from distill.manifest import MANIFEST, peak_rss_bytes, run_stage
from distill.recipe import Recipe
from distill.records import StageManifest
from eval import report
from eval.compare import compare_run
from eval.harness import SAMPLES, SCORES
from pipelines.context import Context

# What decides how a report looks; a change of any of them writes the report again.
SOURCES = (
    "templates",
    *(f"{name}.py" for name in ("charts", "compare", "curation", "page", "report", "scored")),
    *(f"{name}.py" for name in ("bootstrap", "conditions", "power", "statistics", "summary", "traces")),
)


def compare(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Write the report of what has been scored. Raises DataError where nothing has."""
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
    inputs |= {f"code:{name}": Path(report.__file__).parent / name for name in SOURCES}
    outputs: list[str] = []

    def body() -> Mapping[str, Any]:
        started = time.monotonic()
        comparison = compare_run(run_dir, recipe.deciding_suite, context.progress)
        outputs.extend(
            report.write_report(
                comparison,
                run_dir / "report",
                elapsed_s=lambda: time.monotonic() - started,
                peak_rss_bytes=peak_rss_bytes,
                device=device_name(),
                progress=context.progress,
            )
        )
        return {
            "models": len(comparison.models),
            "students": len(comparison.students),
            "suites": len(comparison.suites),
            "size": {suite.name: suite.size_verdict for suite in comparison.suites},
        }

    config = {"name": recipe.name, "deciding_suite": recipe.deciding_suite}
    return run_stage("compare", inputs, config, run_dir / "report", body, outputs)
