from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.manifest import read_manifest
from distill.recipe import Recipe
from pipelines.context import Context
from pipelines.stages.compare import compare
from tests.eval.synthetic_run import write_synthetic_run

HERE = Context(base_dir=Path())
RECIPE = Recipe.model_validate(
    {
        "name": "pico",
        "problems": [{"kind": "local", "path": "p.jsonl"}],
        "teacher": {"backend": "native", "model": "teacher/pico"},
        "distill": {"students": ["qwen2-0.2m"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 1, "split": "held_out"}},
    }
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_synthetic_run(tmp_path / "pico", questions=3)


def test_the_report_is_written_once_and_again_when_a_score_changes(run_dir):
    first = compare(RECIPE, run_dir, HERE)
    charts = ("accuracy_by_parameters-pico", "accuracy_by_family-pico", "accuracy_against_cost-pico")
    names = {"index.html", "summary.json", "summary.md", "traces"}
    names |= {f"{name}.csv" for name in ("scores", "pairs", "tradeoffs", "training_curves")}
    pictures = {
        f"{name}.{ending}" for name in (*charts, "filter_funnel", "training_curves") for ending in ("png", "svg")
    }
    assert set(first.outputs) == names | pictures
    assert first.counts["models"] == 13
    page = run_dir / "report" / "index.html"
    stamp = page.stat().st_mtime_ns
    assert compare(RECIPE, run_dir, HERE) == first
    assert page.stat().st_mtime_ns == stamp
    cards = json.loads((run_dir / "eval" / "teacher" / "scores.json").read_text())
    cards[0]["value"] = 0.123
    (run_dir / "eval" / "teacher" / "scores.json").write_text(json.dumps(cards))
    assert compare(RECIPE, run_dir, HERE).fingerprint != first.fingerprint
    assert "12.3" in page.read_text()


@pytest.mark.slow
def test_a_damaged_report_is_written_again(run_dir):
    first = compare(RECIPE, run_dir, HERE)
    (run_dir / "report" / "index.html").write_text("torn")
    again = compare(RECIPE, run_dir, HERE)
    assert again.fingerprint == first.fingerprint
    assert "potstill" in (run_dir / "report" / "index.html").read_text()


def test_nothing_scored_is_one_line_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="run eval first"):
        compare(RECIPE, tmp_path / "pico", HERE)
    assert not (tmp_path / "pico" / "report").exists()


@pytest.mark.parametrize("name", ["funnel.json", "audit.json"])
@pytest.mark.slow
def test_a_broken_file_of_curation_leaves_no_manifest(run_dir, name):
    compare(RECIPE, run_dir, HERE)
    (run_dir / "curate" / name).write_text("{")
    with pytest.raises(DataError, match=name):
        compare(RECIPE, run_dir, HERE)
    assert read_manifest(run_dir / "report") is None
