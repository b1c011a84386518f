"""Pareto fronts of what a score takes, and the training curves beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.manifest import MANIFEST
from eval.compare import compare_run
from eval.report import tables_csv
from eval.tradeoffs import Front, fronts
from eval.training_curves import MAX_POINTS, read_curves
from tests.eval.synthetic_run import write_synthetic_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Scoring a model takes two seconds an answer and a GiB for each place in the alphabet."""
    run = write_synthetic_run(tmp_path_factory.mktemp("run") / "pico", questions=2, samples=1)
    for place, path in enumerate(sorted((run / "eval").glob(f"*/{MANIFEST}")), start=1):
        manifest = json.loads(path.read_text())
        manifest |= {"seconds": 2.0 * place * 10, "peak_rss_bytes": place * 2**30}
        manifest["counts"]["asked"] = 10
        path.write_text(json.dumps(manifest))
    return run


def by_definition(front: Front) -> set[str]:
    def worse(one, other) -> bool:
        better = other.amount < one.amount or other.accuracy > one.accuracy
        return other.amount <= one.amount and other.accuracy >= one.accuracy and better

    return {p.model.name for p in front.points if not any(worse(p, other) for other in front.points)}


def test_a_front_is_what_no_model_beats_for_no_more(run):
    suite = compare_run(run).suites[0]
    found = {front.key: front for front in fronts(suite, 36.0)}
    assert list(found) == ["parameters", "tokens", "seconds", "memory", "cost"]
    for front in found.values():
        assert len(front.points) == 13
        assert {point.model.name for point in front.best} == by_definition(front)
        accuracy = {point.model.name: (point.accuracy, point.amount) for point in front.points}
        for point in front.points:
            if point.dominated_by:
                assert accuracy[point.dominated_by][0] >= point.accuracy
                assert accuracy[point.dominated_by][1] <= point.amount
    assert [point.amount for point in found["seconds"].points] == [2.0 * place for place in range(1, 14)]
    assert [point.amount for point in found["memory"].points] == list(range(1, 14))
    assert found["cost"].points[0].amount == pytest.approx(20), "1,000 answers of 2 s at 36 an hour"


def test_what_is_not_known_has_no_axis(run):
    suite = compare_run(run).suites[0]
    assert "cost" not in {front.key for front in fronts(suite)}
    for model in suite.models:
        del model.manifest.counts["asked"]
    assert "seconds" not in {front.key for front in fronts(suite, 36.0)}


def test_curves_are_the_logs_thinned_and_a_broken_log_is_named(run):
    curves = read_curves(run)
    assert {curve.method for curve in curves} == {"direct", "distilled"}
    assert len(curves) == 8
    for curve in curves:
        log = json.loads((run / "distill" / curve.name / "train_log.json").read_text())
        assert 1 < len(curve.steps) <= MAX_POINTS
        assert curve.steps[0][1] == pytest.approx(sum(step["loss"] for step in log["steps"][:5]) / 5)
    rows = list(csv.DictReader(tables_csv(compare_run(run))["pairs.csv"].splitlines()))
    assert len(rows) == 13 * 12 / 2
    (run / "distill" / curves[0].name / "train_log.json").write_text('{"steps": [1]}')
    with pytest.raises(DataError, match="not a training log"):
        read_curves(run)
