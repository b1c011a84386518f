"""Several runs in one report: by the command, with models named by their run, paired where they were asked alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from distill.errors import DataError
from distill.manifest import MANIFEST
from pipelines.across import compare_runs
from pipelines.cli import app
from pipelines.context import Context
from tests.eval.synthetic_run import write_synthetic_run
from tests.eval.test_report import Page
from tests.pipelines.test_stage_compare import RECIPE

SIZES = {"qwen2-0.2m": 203_168, "qwen2-0.4m": 401_920}
HERE = Context(base_dir=Path())


def write_run(folder: Path, *, seed: int, suites: tuple[str, ...] = ("pico",)) -> Path:
    run = write_synthetic_run(folder, suites=suites, sizes=SIZES, questions=3, samples=2, seed=seed)
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE.model_dump(mode="json")))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two folders of one name; in the second one student was asked at another temperature."""
    folder = tmp_path_factory.mktemp("runs")
    made = [
        write_run(folder / "monday" / "pico", seed=1),
        write_run(folder / "tuesday" / "pico", seed=2, suites=("pico", "gsm8k")),
    ]
    for run, temperature in zip(made, (0.6, 1.0), strict=True):
        path = run / "eval" / "qwen2-0.2m-distilled" / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["config"]["sampling"] = {"temperature": temperature, "seed": temperature}
        path.write_text(json.dumps(manifest))
    return made


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "both"
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--report", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"report: {folder / 'index.html'}" in done.stdout
    return folder


@pytest.mark.slow
def test_every_model_of_every_run_is_in_it_by_the_runs_name(runs, report):
    summary = json.loads((report / "summary.json").read_text())
    assert [suite["name"] for suite in summary["suites"]] == ["pico", "gsm8k"]
    names = {model["name"] for model in summary["suites"][0]["models"]}
    alone = {path.name for run in runs for path in (run / "eval").iterdir() if path.is_dir()}
    assert names == {f"{day}/pico/{name}" for day in ("monday", "tuesday") for name in alone}
    words = " ".join(" ".join(Page((report / "index.html").read_text()).words).split())
    for name in names:
        assert name in words
    assert {row["name"] for row in summary["stages"]} >= {"monday/pico/eval", "tuesday/pico/eval"}
    for run in runs:
        assert not (run / "report").exists(), "runs stay as they are"


@pytest.mark.slow
def test_a_student_is_paired_with_itself_where_it_was_asked_alike(runs, report):
    summary = json.loads((report / "summary.json").read_text())
    pairs = {pair["second"]: pair for pair in summary["suites"][0]["run_pairs"]}
    assert len(pairs) == 1 + 3 * len(SIZES)
    fine = pairs["tuesday/pico/qwen2-0.4m-distilled"]
    assert fine["first"] == "monday/pico/qwen2-0.4m-distilled"
    values = [
        {m["name"]: m["scores"]["pass@1"]["value"] for m in summary["suites"][0]["models"]}[fine[k]]
        for k in ("second", "first")
    ]
    assert fine["difference"]["value"] == pytest.approx(values[0] - values[1])
    assert fine["difference"]["num_questions"] == 30
    other = pairs["tuesday/pico/qwen2-0.2m-distilled"]
    assert other["difference"] is None
    assert other["why_not"] == "sampling.temperature 0.6 and 1.0", "seeds may differ"
    assert summary["suites"][1]["run_pairs"] == []
    words = " ".join(" ".join(Page((report / "index.html").read_text()).words).split())
    assert "tuesday/pico/qwen2-0.2m-distilled not paired sampling.temperature 0.6 and 1.0" in words


@pytest.mark.slow
def test_sizes_are_compared_within_a_run(report):
    for suite in json.loads((report / "summary.json").read_text())["suites"]:
        for step in suite["size_steps"]:
            assert step["smaller"].rpartition("/")[0] == step["larger"].rpartition("/")[0]


@pytest.mark.slow
def test_a_report_is_written_again_in_its_own_folder_and_never_over_other_things(runs, report, tmp_path):
    compare_runs(runs, report, HERE)
    full = tmp_path / "mine"
    full.mkdir()
    (full / "precious.png").write_text("kept")
    with pytest.raises(DataError, match="not empty"):
        compare_runs(runs, full, HERE)
    assert [path.name for path in full.iterdir()] == ["precious.png"]
    with pytest.raises(DataError, match="not empty"):
        compare_runs(runs, runs[0], HERE)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "has no recipe.yaml"),
        (lambda run: (run / "eval" / MANIFEST).unlink(), "run `potstill eval` with this recipe first"),
        (lambda run: (run / "eval" / "teacher" / "scores.json").write_text("["), "not a list of score cards"),
    ],
)
def test_a_folder_that_is_no_scored_run_is_one_line_and_nothing_is_written(runs, tmp_path, spoil, says):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    spoil(other)
    with pytest.raises(DataError, match=says):
        compare_runs([runs[1], other], tmp_path / "report", HERE)
    assert not (tmp_path / "report" / "index.html").exists()
    with pytest.raises(DataError, match="is given twice"):
        compare_runs([runs[0], runs[0]], tmp_path / "report", HERE)


def test_options_of_the_other_form_are_refused(runs):
    from distill.errors import RecipeError

    for arguments in ([*map(str, runs), "--set", "name=x"], ["pico", "--report", "x"]):
        done = CliRunner().invoke(app, ["compare", *arguments])
        assert isinstance(done.exception, RecipeError)
