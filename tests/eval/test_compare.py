from __future__ import annotations

import csv
import json
import math
from statistics import fmean, stdev

import pyarrow.parquet as pq
import pytest

from distill.errors import DataError
from eval.compare import SizeStep, compare_run, size_verdict
from eval.statistics import Difference
from eval.summary import scores_csv, summary, summary_markdown
from tests.eval.synthetic_run import FAMILIES, SIZES, write_synthetic_run

SUITES = ("pico", "math500", "gsm8k")
COST = {"name": "compare", "seconds": 2.0, "peak_rss_bytes": 5, "device": "a laptop"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_synthetic_run(tmp_path_factory.mktemp("run") / "pico", suites=SUITES)


@pytest.fixture(scope="module")
def comparison(run):
    return compare_run(run)


@pytest.fixture(scope="module")
def got(comparison):
    return summary(comparison, [*comparison.stages, COST])


def rows_of(run, model: str, suite: str) -> list[dict]:
    return [row for row in pq.read_table(run / "eval" / model / "samples.parquet").to_pylist() if row["suite"] == suite]


def test_the_summary_says_what_the_run_was_and_what_it_cost(got):
    assert (got["name"], got["device"]) == ("pico", "NVIDIA H200"), "not the laptop that wrote the report"
    assert [stage["name"] for stage in got["stages"]] == ["generate", "curate", "distill", "eval", "compare"]
    assert all(set(stage) == {"name", "seconds", "peak_rss_bytes", "device"} for stage in got["stages"])
    assert got["stages"][2]["seconds"] == 8 * 21.0, "students trained one by one are one stage"
    assert got["seconds"] == pytest.approx(74.2 + 9.6 + 8 * 21.0 + 83.0 + 2.0)
    assert got["funnel"][0] == {"filter": "correct_only", "in": 8192, "out": 7804}
    assert got["questions"]["tales"][1] == {"filter": "agreement", "in": 640, "out": 512}
    assert got["hinted"] == 37


def test_the_summary_has_a_card_for_every_model_and_suite(got):
    fields = {"name", "role", "architecture", "num_parameters", "num_active_parameters", "suite", "metric", "value"}
    fields |= {"stderr", "ci95", "num_questions", "num_samples"}
    assert all(set(model) == fields for model in got["models"])
    assert {(card["suite"], card["metric"]) for card in got["models"]} == {(suite, "pass@1") for suite in SUITES}
    assert len(got["models"]) == 13 * 3
    teacher = got["models"][0]
    assert teacher["num_active_parameters"] < teacher["num_parameters"]


def test_a_suite_says_of_every_model_what_its_samples_say(run, got):
    for suite in got["suites"]:
        assert len(suite["models"]) == 13
        for model in suite["models"]:
            rows = rows_of(run, model["name"], suite["name"])
            assert model["num_samples"] == len(rows)
            assert model["num_questions"] * model["samples_per_question"] == len(rows)
            assert model["truncated"] == pytest.approx(fmean(row["verdict"] == "truncated" for row in rows))
            assert model["mean_tokens"] == pytest.approx(fmean(row["num_tokens"] for row in rows))
            assert model["unverifiable"] == sum(row["verdict"] == "unverifiable" for row in rows)
            right = fmean(row["verdict"] == "correct" for row in rows)
            assert model["scores"]["pass@1"]["value"] == pytest.approx(right)
            assert set(model["scores"]) == {"pass@1", "pass@2", "pass@4", "cons@4"}
            tokens = sorted(row["num_tokens"] for row in rows)
            assert tokens[len(tokens) // 2 - 1] <= model["p50_tokens"] <= tokens[len(tokens) // 2]
            assert model["p50_tokens"] < model["p95_tokens"] <= tokens[-1]
            assert (model["format_rate"], model["language_mixing"]) == (1.0, 0.0)
            assert (model["engine"], model["engine_version"], model["ungraded"]) == ("native", "0.1.0", 0)
    families = {suite["name"]: set(suite["models"][0]["families"]) for suite in got["suites"]}
    assert families == {"pico": set(FAMILIES), "math500": {f"level {n}" for n in range(1, 6)}, "gsm8k": set()}


def test_what_a_student_gained_is_paired_over_the_questions_of_each_suite(run, got):
    assert [student["name"] for student in got["students"]] == sorted(SIZES, key=lambda name: (SIZES[name], name))
    for student in got["students"]:
        assert list(student["gained"]) == list(SUITES)
    for role in ("base", "direct"):
        means = []
        for model in ("qwen2-0.4m-distilled", f"qwen2-0.4m-{role}"):
            right: dict[str, list[bool]] = {}
            for row in rows_of(run, model, "gsm8k"):
                right.setdefault(row["problem_id"], []).append(row["verdict"] == "correct")
            means.append({question: fmean(of) for question, of in right.items()})
        differences = [means[0][question] - means[1][question] for question in means[0]]
        gained = next(s for s in got["students"] if s["name"] == "qwen2-0.4m")["gained"]["gsm8k"][role]
        assert gained["value"] == pytest.approx(fmean(differences))
        assert gained["stderr"] == pytest.approx(stdev(differences) / math.sqrt(24))
        assert gained["within_interval"] == (gained["ci95"][0] <= 0 <= gained["ci95"][1])


def test_sizes_are_compared_within_an_architecture_and_beyond_where_it_has_no_larger(got):
    for suite in got["suites"]:
        steps = [(step["smaller"], step["larger"], step["one_architecture"]) for step in suite["size_steps"]]
        assert steps == [
            ("qwen2-0.2m", "qwen2-0.4m", True),
            ("qwen2-0.4m", "qwen2-0.8m", True),
            ("llama-0.4m", "qwen2-0.8m", False),
        ]
        for step in suite["size_steps"]:
            assert step["within_interval"] == (step["ci95"][0] <= 0 <= step["ci95"][1]) == (step["p_value"] >= 0.05)
            assert step["clear"] == (step["adjusted_p"] < 0.05)


def test_all_gains_of_a_run_are_one_family_of_comparisons(got):
    gains = [gain for one in got["students"] for of_suite in one["gained"].values() for gain in of_suite.values()]
    assert len(gains) == 2 * len(SIZES) * len(SUITES)
    ordered = sorted(gains, key=lambda gain: gain["p_value"])
    assert ordered[0]["adjusted_p"] == pytest.approx(min(1.0, len(gains) * ordered[0]["p_value"]))
    assert ordered[-1]["adjusted_p"] == max(gain["adjusted_p"] for gain in gains)
    assert len({suite["size_steps"][0]["value"] for suite in got["suites"]}) == 3


def test_the_deciding_suite_decides_the_best_and_is_named(run, comparison, got):
    assert (comparison.best.suite, got["best"]["suite"]) == ("pico", "pico"), "the first that was scored"
    for suite in SUITES:
        decided = compare_run(run, suite)
        best = max((m.card(suite) for m in decided.models if m.role == "distilled"), key=lambda card: card.value)
        assert decided.best == best
        stated = summary(decided, [COST])["best"]
        assert (stated["student"], stated["suite"]) == (best.name.removesuffix("-distilled"), suite)
        assert stated["rule"] == f"highest pass@1 on {suite}, of equals the smaller (push.best_by)"
    none = compare_run(run, "aime24")
    assert (none.best, summary(none, [COST])["best"]) == (None, None)


def test_tables_beside_the_report_hold_every_suite(comparison, got):
    rows = list(csv.DictReader(scores_csv(comparison).splitlines()))
    cards = [card for model in comparison.models for card in model.cards]
    assert [float(row["value"]) for row in rows] == [card.value for card in cards]
    assert {(row["suite"], row["family"], row["metric"]) for row in rows} >= {
        ("pico", "gcd", "pass@1"),
        ("math500", "level 5", "pass@1"),
        ("gsm8k", "", "cons@4"),
    }
    text = summary_markdown(comparison, got["stages"])
    for suite in got["suites"]:
        section = text[text.index(f"## {suite['name']}\n") :]
        assert suite["size_verdict"] in section
        for model in suite["models"]:
            low, high = (100 * bound for bound in model["scores"]["pass@1"]["ci95"])
            assert f"{100 * model['scores']['pass@1']['value']:.1f} ({low:.1f} to {high:.1f})" in section
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8, 7}, "the two kinds of tables, every row whole"


def step(value: float, half: float, *, among: int = 1, **more) -> SizeStep:
    """One of `among` steps, with a normal test's p-value."""
    p = math.erfc(abs(value) / (half / 1.96) / math.sqrt(2))
    difference = Difference(value, half / 2, (value - half, value + half), 100, p, min(1.0, among * p))
    return SizeStep("small", "large", difference, **more)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no two distilled students"),
        ([step(0.1, 0.05), step(0.05, 0.04)], "Larger is better at every step"),
        (
            [step(0.1, 0.05), step(0.01, 0.04)],
            "At 1 of 2 steps larger is clearly better; at 1 the difference is not clear",
        ),
        (
            [step(-0.1, 0.05), step(0.01, 0.04)],
            "At 1 of 2 steps the difference is not clear; at 1 the larger",
        ),
        ([step(-0.1, 0.05)], "At every step the larger student is clearly worse."),
        ([step(0.05, 0.048, among=3)], "At every step the difference is not clear."),
    ],
)
def test_the_size_verdict_says_what_the_intervals_say(steps, words):
    assert words in size_verdict(steps)


def test_a_step_in_words():
    told = "large beats small: +10.0 points (95% interval +5.0 to +15.0), p under 0.0001 of all steps together"
    assert str(step(0.1, 0.05)) == told
    assert str(step(0.05, 0.048, among=3)).endswith("p 0.12 of all steps together, which is not clear")
    assert str(step(0.01, 0.05)).endswith("the difference lies within its interval")
    assert "falls behind small (another architecture)" in str(step(-0.1, 0.05, one_architecture=False))


def test_faults_name_the_file(tmp_path):
    with pytest.raises(DataError, match="holds no scores: run eval first"):
        compare_run(tmp_path)
    run = write_synthetic_run(tmp_path / "run", questions=2)
    (run / "curate" / "funnel.json").write_text('[{"filter": "x"}]')
    with pytest.raises(DataError, match=r"funnel.json: not a list of filters"):
        compare_run(run)
    scores = run / "eval" / "teacher" / "scores.json"
    cards = json.loads(scores.read_text())
    scores.write_text(json.dumps([*cards, {**cards[0], "suite": "gsm8k"}]))
    with pytest.raises(DataError, match=r"samples.parquet: holds no sample of the suite 'gsm8k'"):
        compare_run(run)
    (run / "eval" / "teacher" / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"samples.parquet: not a readable Parquet file"):
        compare_run(run)
    scores.write_text("[{}]")
    with pytest.raises(DataError, match=r"scores.json: not a list of score cards"):
        compare_run(run)
