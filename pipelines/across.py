"""Compare several runs: one report of all their models, in a folder of its own; the runs stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.errors import DataError
from distill.manifest import read_manifest
from distill.recipe import load_recipe
from distill.records import StageManifest
from eval.across import merge, run_names
from eval.compare import Comparison, compare_run
from pipelines.chain import require_complete
from pipelines.context import Context
from pipelines.run_folder import LOCK, check_writable, held
from pipelines.stages.compare import LEAKS, contamination_of, inputs_of, write_comparison

STAGE = "compare-runs"
RECIPE = "recipe.yaml"


def compare_runs(run_dirs: Sequence[Path], out_dir: Path, context: Context) -> StageManifest:
    """Write the report of several runs to `out_dir`.

    Raises DataError for a folder that holds no scored run, a run given twice, and an `out_dir` that holds anything but
    such a report.
    """
    for place, run_dir in enumerate(run_dirs):
        if not (run_dir / RECIPE).is_file():
            raise DataError(f"holds no run: it has no {RECIPE}", where=run_dir)
        if run_dir.resolve() in (other.resolve() for other in run_dirs[:place]):
            raise DataError("is given twice", where=run_dir)
    recipes = [load_recipe(run_dir / RECIPE, []) for run_dir in run_dirs]
    for recipe, run_dir in zip(recipes, run_dirs, strict=True):
        require_complete("eval", recipe, run_dir)
    _check_folder(out_dir)
    names = run_names(run_dirs)
    inputs = {
        f"{run}:{name}": path
        for run, run_dir in zip(names, run_dirs, strict=True)
        for name, path in inputs_of(run_dir).items()
    }
    thresholds = [recipe.curate.min_containment for recipe in recipes]
    config = {"runs": names, "deciding_suite": recipes[0].deciding_suite, "min_containment": thresholds}

    def read() -> Comparison:
        runs = {}
        for run, recipe, run_dir in zip(names, recipes, run_dirs, strict=True):
            one = compare_run(run_dir, recipes[0].deciding_suite, context.progress)
            found = contamination_of(one, recipe, run_dir, out_dir / LEAKS / run, context.progress)
            runs[run] = replace(one, contamination=found, price_per_hour=recipe.eval.price_per_hour)
        return merge(runs)

    with held(out_dir):
        return write_comparison(STAGE, read, inputs, config, out_dir, context.progress)


def _check_folder(folder: Path) -> None:
    """Raise DataError unless the folder is new, empty, or holds a report of this kind, which is written anew."""
    check_writable(folder)
    if not folder.is_dir() or not [path for path in folder.iterdir() if path.name not in (LOCK, LEAKS)]:
        return
    manifest = read_manifest(folder)
    if manifest is None and (folder / "index.html").is_file() and (folder / LEAKS).is_dir():
        return  # one that was stopped while it was written
    if manifest is None or manifest.stage != STAGE:
        raise DataError("is not empty and holds no report of several runs: name another with --report", where=folder)
