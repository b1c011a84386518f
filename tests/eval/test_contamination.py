"""Questions of the suites in what students learned from: what is found and where, and the scores without them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest

from distill.progress import silent
from distill.records import Example, Problem
from distill.tables import write_records
from eval.contamination import Contamination, change_without, find_leaks
from pipelines.context import Context
from pipelines.stages.compare import compare
from tests.eval.synthetic_run import write_synthetic_run
from tests.eval.test_report import Page
from tests.pipelines.test_stage_compare import RECIPE

WALK = (
    "Every morning Aya goes for a nine kilometer long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of s kilometers per hour, the walk takes her 4 hours."
)
DIVISORS = "How many positive divisors does the number 2024 have?"
SUM = "What is 17 + 25?"
QUESTIONS = {("aime", "walk"): WALK, ("aime", "divisors"): DIVISORS, ("other", "walk2"): WALK, ("own", "sum"): SUM}


def look(tmp_path: Path, rows: list[tuple[str, str]], *, grader: str = "math", suffix: str = "") -> Contamination:
    """`rows` are question and completion of the training examples."""
    problems = [Problem(prompt=asked, answer="1", grader=grader, source="t") for asked, _ in rows]  # type: ignore[arg-type]
    examples = [
        Example(question=f"{asked}{suffix}", completion=told, problem_id=problem.id, trace_key=f"{n:032x}", source="t")
        for n, (problem, (asked, told)) in enumerate(zip(problems, rows, strict=True))
    ]
    write_records(tmp_path / "problems.parquet", problems, Problem)
    write_records(tmp_path / "examples.parquet", examples, Example)
    sets = {"distilled": (tmp_path / "examples.parquet", ["s-distilled"])}
    return find_leaks(QUESTIONS, sets, tmp_path / "problems.parquet", min_containment=0.3, progress=silent())


def test_each_question_is_found_with_the_example_and_the_words_in_it(tmp_path):
    rows = [("What is 3 + 4?", "Seven."), (f"Solve this: {WALK.upper()}", "4"), ("So?", f"First,  {DIVISORS} Then 16.")]
    found = look(tmp_path, [*rows, (SUM, "42"), (SUM.replace("17", "18"), "43"), rows[1]])
    assert [(one.suite, one.question_id, one.num_examples) for one in found.leaked] == [
        ("aime", "walk", 2),
        ("aime", "divisors", 1),
        ("other", "walk2", 2),
        ("own", "sum", 1),
    ]
    walk, divisors, _, own = (one.examples[0] for one in found.leaked)
    assert (walk.row, walk.part, walk.test) == (2, "question", "13-gram")
    assert walk.matched == "EVERY MORNING AYA GOES FOR A NINE KILOMETER LONG WALK AND STOPS AT"
    assert walk.before + walk.matched + walk.after == rows[1][0]
    assert (divisors.row, divisors.part, divisors.test) == (3, "completion", "contained")
    assert (divisors.before, divisors.matched, divisors.after) == ("First,  ", DIVISORS[:-1], "? Then 16.")
    assert (own.row, own.test, own.matched, own.trace_key) == (4, "exact", SUM, f"{3:032x}")
    assert found.training_sets[0].num_examples == 6


def test_words_around_a_question_hide_no_exact_match(tmp_path):
    found = look(tmp_path, [(SUM, "42")], suffix="\n\nPut the answer into a box.")
    assert found.question_ids("own") == {"sum"}


def test_procedural_questions_are_compared_whole(tmp_path):
    assert look(tmp_path, [(f"{WALK} Then sing.", WALK)], grader="reasoning_gym").leaked == ()
    assert look(tmp_path, [(WALK, "4")], grader="reasoning_gym").question_ids("aime") == {"walk"}


def test_the_change_is_that_of_the_mean_and_its_error_that_of_many_draws():
    rng = random.Random(3)

    def draw() -> tuple[dict[str, float], set[str]]:
        left_out = {str(n) for n in range(120) if rng.random() < 0.15}
        return {str(n): float(rng.random() < (0.9 if str(n) in left_out else 0.4)) for n in range(120)}, left_out

    draws = [draw() for _ in range(1_000)]
    changes = [change_without(*one) for one in draws]
    for (means, left_out), change in zip(draws[:20], changes, strict=False):
        clean = fmean(mean for name, mean in means.items() if name not in left_out)
        assert change.value == pytest.approx(clean - fmean(means.values()))
    truth = 0.4 - (0.15 * 0.9 + 0.85 * 0.4)
    covered = fmean(change.ci95[0] <= truth <= change.ci95[1] for change in changes)
    assert 0.93 <= covered <= 0.97, "1,000 draws: a standard error of 0.7 points"
    half = fmean((change.ci95[1] - change.ci95[0]) / 2 for change in changes)
    assert half == pytest.approx(1.98 * stdev(change.value for change in changes), rel=0.1)


def test_agreement_by_luck_is_no_certainty():
    means = {str(n): 1.0 for n in range(10)}
    change = change_without(means, {"0", "1"})
    assert change.value == 0
    assert change.ci95[0] < -0.02
    assert change.ci95[1] > 0.02
    assert change_without({**means, "0": 0.0}, {"0"}).ci95[1] > 0.05
    assert change_without(means, set()).ci95 == (0, 0)
    with pytest.raises(ValueError, match="no question is left"):
        change_without(means, set(means))


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> Path:
    """A run whose students learned two of its suite's questions by heart, one of them hostile; and its report."""
    run = write_synthetic_run(tmp_path_factory.mktemp("runs") / "pico", questions=3, samples=2)
    asked = ["<b>gcd</b> & what is 7 * 0 + 3?", "What is 7 * 1 + 3?", "</pre><script>1</script>=\u202e?"]
    problems = [Problem(prompt=one, answer="1", grader="math", source="t") for one in asked]
    examples = [
        Example(question=p.prompt, completion="4", problem_id=p.id, trace_key=None, source="t") for p in problems
    ]
    (run / "generate").mkdir(exist_ok=True)
    write_records(run / "generate/problems.parquet", problems, Problem)
    write_records(run / "curate/examples.parquet", examples, Example)
    write_records(run / "curate/direct.parquet", examples[:1], Example)
    compare(RECIPE, run, Context(base_dir=Path()))
    return run


def test_the_report_shows_what_leaked_and_every_score_without_it(leaking):
    summary = json.loads((leaking / "report/summary.json").read_text())
    (suite,) = summary["contamination"]["suites"]
    assert suite["num_leaked"] == 1 + 10, "a question of its own family, and one that all families have alike"
    assert [one["num_examples"] for one in summary["contamination"]["training_sets"]] == [3, 1]
    assert len(suite["models"]) == 13
    full = {model["name"]: model["scores"]["pass@1"]["value"] for model in summary["suites"][0]["models"]}
    for model in suite["models"]:
        assert model["num_questions"] == 30 - 11
        assert model["clean"]["value"] - full[model["name"]] == pytest.approx(model["change"]["value"])
    text = (leaking / "report/index.html").read_text()
    assert text.count("<mark>") >= 11
    assert "<mark>&lt;b&gt;gcd&lt;/b&gt; &amp; what is 7 * 0 + 3?</mark>" in text
    words = " ".join(" ".join(Page(text).words).split())
    assert "pico without the 11 questions" in words
    for model in suite["models"]:
        assert f"{model['name']} {100 * full[model['name']]:.1f}" in words


def test_leaks_are_a_table_too_and_are_looked_for_once(leaking):
    rows = list(csv.DictReader((leaking / "report/contamination.csv").open()))
    assert {(row["training_set"], row["test"], row["part"]) for row in rows} == {
        ("distilled", "exact", "question"),
        ("direct", "exact", "question"),
    }
    assert len({row["question_id"] for row in rows}) == 11
    findings = leaking / "report/contamination/findings.json"
    stamp = findings.stat().st_mtime_ns
    (leaking / "report/index.html").unlink()
    compare(RECIPE, leaking, Context(base_dir=Path()))
    assert findings.stat().st_mtime_ns == stamp
    write_records(leaking / "curate/direct.parquet", [], Example)
    compare(RECIPE, leaking, Context(base_dir=Path()))
    assert findings.stat().st_mtime_ns != stamp
