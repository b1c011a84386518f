from __future__ import annotations

import pytest

from distill.errors import DataError
from eval.compare import SizeStep, compare_run, size_verdict, summary
from eval.statistics import Difference
from tests.eval.synthetic_run import FAMILIES, SIZES, write_synthetic_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return compare_run(write_synthetic_run(tmp_path_factory.mktemp("run") / "pico"))


def test_summary_has_the_agreed_form(comparison):
    got = summary(comparison)
    assert set(got) == {"stages", "models", "funnel", "questions", "hinted", "audit"}
    assert [stage["name"] for stage in got["stages"]] == ["generate", "curate", "distill", "eval"]
    assert all(set(stage) == {"name", "seconds", "peak_rss_bytes"} for stage in got["stages"])
    assert got["stages"][2]["seconds"] == 8 * 21.0, "students trained one by one are one stage"
    assert len(got["models"]) == 13
    fields = {"name", "role", "architecture", "num_parameters", "num_active_parameters", "suite", "metric", "value"}
    fields |= {"stderr", "ci95", "num_questions", "num_samples"}
    assert all(set(model) == fields for model in got["models"])
    assert {(model["suite"], model["metric"]) for model in got["models"]} == {("pico", "pass@1")}
    teacher = next(model for model in got["models"] if model["role"] == "teacher")
    assert teacher["num_active_parameters"] < teacher["num_parameters"]
    assert got["funnel"][0] == {"filter": "correct_only", "in": 8192, "out": 7804}
    assert got["questions"]["tales"][1] == {"filter": "agreement", "in": 640, "out": 512}
    assert got["hinted"] == 37


def test_rows_are_by_size_and_gains_are_paired(comparison):
    assert [row.student for row in comparison.students] == sorted(SIZES, key=SIZES.get)
    for row in comparison.students:
        for role, gain in row.gains.items():
            assert gain.value == pytest.approx(row.scores["distilled"].value - row.scores[role].value)
            assert gain.num_questions == 24 * len(FAMILIES)


def test_sizes_are_compared_within_an_architecture(comparison):
    assert [(step.smaller, step.larger) for step in comparison.size_steps] == [
        ("qwen2-0.2m", "qwen2-0.4m"),
        ("qwen2-0.4m", "qwen2-0.8m"),
    ]


def step(value: float, half: float) -> SizeStep:
    return SizeStep("small", "large", Difference(value, half / 2, (value - half, value + half), 100))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no two distilled students"),
        ([step(0.1, 0.05), step(0.05, 0.04)], "Larger is better at every step"),
        ([step(0.1, 0.05), step(0.01, 0.04)], "clearly better at 1 of 2 steps; at 1 the difference lies within its"),
        ([step(-0.1, 0.05)], "At 1 the larger student is clearly worse."),
        ([step(0.01, 0.05)], "At 1 the difference lies within its interval."),
    ],
)
def test_the_size_verdict_says_what_the_intervals_say(steps, words):
    assert words in size_verdict(steps)


def test_a_step_in_words():
    assert str(step(0.1, 0.05)) == "large beats small: +10.0 points (95% interval +5.0 to +15.0)"
    assert str(step(0.01, 0.05)).endswith("the difference lies within its interval")
    assert "falls behind" in str(step(-0.1, 0.05))


def test_faults_name_the_file(tmp_path):
    with pytest.raises(DataError, match="holds no scores: run eval first"):
        compare_run(tmp_path)
    run = write_synthetic_run(tmp_path / "run", questions=2)
    (run / "curate" / "funnel.json").write_text('[{"filter": "x"}]')
    with pytest.raises(DataError, match=r"funnel.json: not a list of filters"):
        compare_run(run)
    (run / "eval" / "teacher" / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"samples.parquet: not a readable Parquet file"):
        compare_run(run)
    (run / "eval" / "teacher" / "scores.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"scores.json: not a list of score cards"):
        compare_run(run)
