"""The compare stage: all scores of a run together, as a report, figures and `summary.json`.

run_dir/report/{index.html, *.png, summary.json, manifest.json}
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.manifest import MANIFEST, peak_rss_bytes, run_stage
from distill.recipe import Recipe
from distill.records import StageManifest
from eval import report
from eval.compare import compare_run
from eval.harness import SAMPLES, SCORES
from pipelines.context import Context

# What decides how a report looks; a change of any of them writes the report again.
SOURCES = ("report.html.jinja", "report.py", "charts.py", "compare.py", "statistics.py")


def compare(recipe: Recipe, run_dir: Path, context: Context) -> StageManifest:
    """Write the report of what has been scored. Raises DataError where nothing has. It takes seconds: no bar."""
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
        comparison = compare_run(run_dir)
        outputs.extend(
            report.write_report(
                comparison,
                run_dir / "report",
                elapsed_s=lambda: time.monotonic() - started,
                peak_rss_bytes=peak_rss_bytes(),
            )
        )
        return {"models": len(comparison.models), "students": len(comparison.students), "size": comparison.size_verdict}

    return run_stage("compare", inputs, {"name": recipe.name}, run_dir / "report", body, outputs)
