"""Grading again: kept samples and traces get the verdicts of today's graders, and no model is asked for anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distill.errors import DataError
from distill.manifest import MANIFEST, read_manifest
from distill.recipe import Recipe, load_recipe
from distill.verify import kept, verifier
from pipelines.chain import require_complete
from pipelines.context import Context
from pipelines.regrade import Regraded, regrade_run
from pipelines.stages.compare import compare
from pipelines.stages.curate import curate
from pipelines.stages.eval import evaluate
from pipelines.stages.generate import generate
from tests.pipelines.recorded_progress import RecordedProgress
from tests.pipelines.tiny_world import potstill, tree_of, write_yaml
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving

QUESTIONS = 5
SUITES = ["held_out", "gsm8k"]
SAMPLES = 2 * QUESTIONS
VERSION = kept.GRADING_VERSION


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is complete up to its report; the teacher alone was scored, and is gone since."""
    folder = tmp_path_factory.mktemp("regrade")
    for name, first in (("p", 10), ("h", 50)):
        rows = [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(first, first + QUESTIONS)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows = [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}"} for n in range(QUESTIONS)]
    (folder / "gsm8k_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with serving(ChatEndpoint()) as endpoint:
        recipe = recipe_of(folder, endpoint.url)
        for stage in (generate, curate, evaluate, compare):
            stage(recipe, folder / "run", Context(folder, num_workers=1))
        assert len(endpoint.payloads) == 3 * SAMPLES
    write_yaml(folder / "run" / "recipe.yaml", recipe.model_dump(mode="json"))
    return folder


def recipe_of(folder: Path, url: str) -> Recipe:
    tree = {
        "name": "run",
        "problems": [{"kind": "local", "path": str(folder / "p.jsonl")}],
        "teacher": {"backend": "openai", "model": "pico", "base_url": url, "prompt_suffix": "Box it."},
        "generate": {"num_samples": 2, "sampling": {"max_tokens": 50}},
        "distill": {"students": ["qwen2-0.2m"]},
        "bench_data": str(folder),
        "eval": {
            "suites": SUITES,
            "held_out": {"kind": "local", "path": str(folder / "h.jsonl"), "split": "all"},
            "num_samples": 2,
            "sampling": {"max_tokens": 50},
            "roles": ["teacher"],
        },
    }
    return Recipe.model_validate(tree)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def recipe(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


@pytest.fixture
def harsh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of the graders, to which every answer is too long."""
    monkeypatch.setattr(kept, "GRADING_VERSION", 99)
    monkeypatch.setattr(verifier, "MAX_ANSWER_CHARS", 0)


def scores(run: Path) -> dict[str, float]:
    cards = json.loads((run / "eval" / "teacher" / "scores.json").read_text())
    return {card["suite"]: card["value"] for card in cards if card["metric"] == "pass@1"}


@pytest.mark.usefixtures("harsh")
def test_scores_and_report_follow_the_graders(run: Path, recipe: Recipe, finished: Path) -> None:
    context, examples = Context(finished), (run / "curate" / "examples.parquet").read_bytes()
    assert scores(run) == {"held_out": 1.0, "gsm8k": 1.0}
    with pytest.raises(DataError, match=rf"graded by potstill {VERSION}, here is 99; run `potstill regrade`"):
        require_complete("eval", recipe, run)
    outcome = regrade_run(recipe, run, context)
    moved = dict.fromkeys(SUITES, (1.0, 0.0))
    assert outcome.models == [Regraded("teacher", 2 * SAMPLES, 2 * SAMPLES, moved)]
    assert outcome.traces == Regraded("traces", SAMPLES, SAMPLES)
    assert outcome.versions["potstill"] == "99"
    assert scores(run) == {"held_out": 0.0, "gsm8k": 0.0}
    verdicts = pq.read_table(run / "eval" / "teacher" / "samples.parquet")["verdict"].to_pylist()
    assert verdicts == ["wrong"] * 2 * SAMPLES
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert {model["value"] for model in summary["models"]} == {0.0}
    assert (run / "curate" / "examples.parquet").read_bytes() == examples, "students have learned from these"

    require_complete("eval", recipe, run)
    before = tree_of(run)
    again = regrade_run(recipe, run, context)
    assert (again.models[0].num_changed, again.traces.num_changed) == (0, 0)
    evaluate(recipe, run, context)
    changed = {name for name, stamp in tree_of(run).items() if before.get(name) != stamp}
    assert not {name for name in changed if not name.endswith((".lock", "-shm", "-wal"))}


@pytest.mark.usefixtures("harsh")
def test_eval_itself_opens_no_model_where_grading_alone_changed(run: Path, recipe: Recipe, finished: Path) -> None:
    shown = RecordedProgress()
    manifest = evaluate(recipe, run, Context(finished, shown, num_workers=1))
    assert "load teacher" not in shown.totals
    assert manifest.counts["asked"] == 0
    assert scores(run) == {"held_out": 0.0, "gsm8k": 0.0}
    assert read_manifest(run / "eval" / "teacher").config["grading"]["grader_versions"]["potstill"] == "99"


def test_verdicts_of_today_change_nothing(run: Path, recipe: Recipe, finished: Path) -> None:
    before = tree_of(run)
    outcome = regrade_run(recipe, run, Context(finished))
    assert [model.num_changed for model in [*outcome.models, outcome.traces]] == [0, 0]
    written = {name for name, stamp in tree_of(run).items() if before.get(name) != stamp}
    assert not {name for name in written if not name.endswith((".lock", "-shm", "-wal"))}


@pytest.mark.usefixtures("harsh")
def test_a_regrade_that_was_killed_goes_on(run: Path, recipe: Recipe, finished: Path) -> None:
    """Scores are written before the manifest that speaks of them."""
    manifest = (run / "eval" / "teacher" / MANIFEST).read_bytes()
    regrade_run(recipe, run, Context(finished))
    done = {name: (run / "eval" / "teacher" / name).read_bytes() for name in ("scores.json", "samples.parquet")}
    (run / "eval" / "teacher" / MANIFEST).write_bytes(manifest)
    (run / "eval" / "teacher" / "scores.json").write_text("[")
    regrade_run(recipe, run, Context(finished))
    assert {name: (run / "eval" / "teacher" / name).read_bytes() for name in done} == done
    require_complete("eval", recipe, run)


@pytest.mark.usefixtures("harsh")
def test_what_is_not_complete_is_named(run: Path, recipe: Recipe, finished: Path) -> None:
    shutil.copytree(run / "eval" / "teacher", run / "eval" / "half")
    (run / "eval" / "half" / MANIFEST).unlink()
    shutil.copytree(run / "eval" / "teacher", run / "eval" / "old")
    (run / "eval" / "old" / "ledger.sqlite").unlink()
    outcome = regrade_run(recipe, run, Context(finished))
    assert [model.name for model in outcome.models] == ["teacher"]
    assert outcome.left == [
        "half: its evaluation is not complete; `potstill eval` goes on with it",
        "old: its samples were not kept one by one; `potstill eval` asks for them again",
    ]


@pytest.mark.usefixtures("harsh")
@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (["1 + 1?"], rf"eval/teacher: {2 * SAMPLES} answers are kept, the suites now want {SAMPLES + 2}; run"),
        (["0 + 1?", "9 + 1?"], r"ledger.sqlite: 2 samples of 'gsm8k' are not kept; run `potstill eval`"),
    ],
)
def test_another_set_of_questions_is_one_line_and_changes_nothing(
    run: Path, recipe: Recipe, finished: Path, questions: list[str], words: str
) -> None:
    """The benchmark's file is not the one that was asked."""
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    rows = [{"question": question, "answer": f"#### {int(question[0]) + 1}"} for question in questions]
    (elsewhere / "gsm8k_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    other = recipe.model_copy(update={"bench_data": str(elsewhere)})
    before = tree_of(run / "eval" / "teacher")
    with pytest.raises(DataError, match=words):
        regrade_run(other, run, Context(finished))
    after = tree_of(run / "eval" / "teacher")
    assert {name: after[name] for name in ("scores.json", "samples.parquet", MANIFEST)}.items() <= before.items()


def test_nothing_kept_is_one_line(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"none: keeps nothing that could be graded again; run `potstill eval`"):
        regrade_run(recipe, tmp_path / "none", Context(tmp_path))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_command_takes_a_run_and_a_recipe(run: Path, tmp_path: Path) -> None:
    """Here the graders get less time: other settings, the same verdicts."""
    by_run = potstill("regrade", run, "--set", "verify.timeout_s=9")
    assert (by_run.returncode, by_run.stderr.count("potstill: ")) == (0, 0)
    lines = by_run.stdout.splitlines()
    assert lines[0].startswith(f"{run}, graded by potstill {VERSION}, ")
    assert ", math-verify " in lines[0]
    assert lines[1] == (
        f"  teacher: 0 of {2 * SAMPLES} verdicts changed; held_out pass@1 100.0 -> 100.0; gsm8k pass@1 100.0 -> 100.0"
    )
    assert lines[2] == f"  traces: 0 of {SAMPLES} verdicts changed"
    assert lines[-1] == f"report: {run / 'report/index.html'}"
    by_recipe = potstill("regrade", run / "recipe.yaml", "--out", tmp_path)
    assert by_recipe.stdout.splitlines()[-1] == lines[-1]
    nothing = potstill("regrade", run / "recipe.yaml", "--out", tmp_path / "none")
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
    assert "keeps nothing that could be graded again" in nothing.stderr
