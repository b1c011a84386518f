from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from starlette.responses import JSONResponse, Response

from distill.errors import DataError, PotstillError
from distill.manifest import run_stage
from distill.problems import load_problems, split_of
from distill.progress import Progress, silent
from distill.recipe import Recipe
from distill.records import Example, Problem
from distill.tables import read_records, write_records
from distill.verify import kept
from eval.compare import compare_run
from eval.summary import scores_csv, summary, summary_markdown
from pipelines.context import Context
from pipelines.stages.curate import held_out_questions
from pipelines.stages.eval import HELD_OUT, _places, evaluate
from pipelines.workers import run_side_by_side
from tests.eval.task_rows import write_arc
from tests.pipelines.recorded_progress import RecordedProgress
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.tiny_models import save_tiny_model
from tests.teacher.v3_models import tiny_config, write_model_folder

ALONE = Context(Path(), num_workers=1)
FAMILIES = {"gcd": {"min_value": 1, "max_value": 99}, "chain_sum": {"min_terms": 2, "max_terms": 3}}


def recipe_of(student: Path, **changes) -> Recipe:
    held_out = {"families": FAMILIES, "count": 6, "seed": 2, "split": "held_out"}
    tree = {
        "name": "tiny",
        "problems": [{"kind": "reasoning_gym", "families": FAMILIES, "count": 8}],
        "teacher": {"backend": "native", "model": str(student.parent / "teacher"), "batch_size": 8},
        "distill": {"students": [str(student)]},
        "eval": {
            "held_out": held_out,
            "num_samples": 2,
            "sampling": {"max_tokens": 12, "temperature": 1.0, "top_p": 1.0},
            "batch_size": 8,
            "roles": ["teacher", "base", "distilled"],
            **changes,
        },
    }
    return Recipe.model_validate(tree)


def example(question: str) -> Example:
    return Example(question=question, completion="\\boxed{1}", problem_id="p", trace_key=None, source="gcd")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    scaling = {"factor": 16.0, "original_max_position_embeddings": 32}
    write_model_folder(folder / "teacher", tiny_config(max_position_embeddings=512, rope_scaling=scaling))
    save_tiny_model(folder / "distilled", template="thinking", seed=1)
    return save_tiny_model(folder / "base"), folder / "distilled", folder / "teacher"


@pytest.fixture
def student(tmp_path, bases) -> Path:
    """The recipe's student file; the teacher's folder lies beside it."""
    (tmp_path / "teacher").symlink_to(bases[2])
    path = tmp_path / "mini.yaml"
    about = "architecture: qwen2\nnum_parameters: 9000\nlicence: apache-2.0\nsft: {lr: 1e-3}\n"
    path.write_text(f"name: mini\nbase: {bases[0]}\n{about}")
    return path


@pytest.fixture
def run_dir(tmp_path, bases) -> Path:
    """A run up to distill: examples, and a distilled student that is a model with other weights."""
    run = tmp_path / "tiny"
    write_records(run / "curate" / "examples.parquet", [example("1 + 1 = ?")], Example)
    trained = run / "distill" / "mini-distilled"
    shutil.copytree(bases[1], trained)
    run_stage("distill-student", {}, {}, trained, dict, ["model.safetensors"])
    return run


def stamps(run_dir: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (run_dir / "eval").rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_model_is_scored_once(student, run_dir, workers):
    recipe, shown = recipe_of(student), RecordedProgress()
    manifest = evaluate(recipe, run_dir, Context(Path(), shown, num_workers=workers))
    for name in ("teacher", "mini-base", "mini-distilled"):
        assert shown.totals[f"load {name}"] is None
        assert shown.done[f"{name} pico"] == shown.done[f"grade {name} pico"] == 12
        assert shown.facts[f"{name} pico"]["tokens"] > 0
    counted = {"held_out": 6, "training_questions": 1, "shared_with_training": 0, "models": 3}
    assert manifest.counts == {**counted, "samples": 3 * 6 * 2, "asked": 3 * 6 * 2}
    problems = read_records(run_dir / "eval" / HELD_OUT, Problem)
    assert {problem.source for problem in problems} == set(FAMILIES)
    assert all(split_of(problem.prompt) == "held_out" for problem in problems)
    for name, role in (("teacher", "teacher"), ("mini-base", "base"), ("mini-distilled", "distilled")):
        (total, *families) = json.loads((run_dir / "eval" / name / "scores.json").read_text())
        assert (total["name"], total["role"], total["suite"], total["metric"]) == (name, role, "pico", "pass@1")
        assert total["architecture"] == ("deepseek_v3" if role == "teacher" else "qwen2")
        assert (total["num_questions"], total["num_samples"]) == (6, 12)
        assert (total["num_parameters"] > total["num_active_parameters"]) == (role == "teacher")
        assert {card["suite"] for card in families if card["metric"] == "pass@1"} == {
            f"pico/{family}" for family in FAMILIES
        }
    before = stamps(run_dir)
    assert evaluate(recipe, run_dir, Context(Path(), num_workers=workers)) == manifest
    assert stamps(run_dir) == before, "the second time nothing is done"


@pytest.mark.parametrize("instruction", ["keep", "drop"])
def test_everyone_is_asked_in_the_words_that_they_know(student, run_dir, tmp_path, instruction):
    """GSM8K's own words give way to the teacher's suffix; students and bases have it where they learned with it."""
    rows = [{"question": f"{n} + {n}?", "answer": f"so\n#### {2 * n}"} for n in range(2)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    plain = recipe_of(student, suites=["gsm8k"], held_out=None).model_copy(update={"bench_data": str(tmp_path)})
    words = {"system_prompt": "Be brief.", "prompt_suffix": "Box it."}

    def prompt_tokens(recipe: Recipe) -> dict[str, list[int]]:
        evaluate(recipe, run_dir, ALONE)
        return {
            path.parent.name: pq.read_table(path)["num_prompt_tokens"].to_pylist()
            for path in (run_dir / "eval").glob("*/samples.parquet")
        }

    r1 = prompt_tokens(plain)
    told = plain.model_copy(
        update={
            "teacher": plain.teacher.model_copy(update=words),
            "curate": plain.curate.model_copy(update={"instruction": instruction}),
        }
    )
    mine = prompt_tokens(told)
    # The tiny tokenizer has a token for every character, and one for each marker of a turn.
    r1_words = len("\nPlease reason step by step, and put your final answer within \\boxed{}.")
    added = len("\n\nBox it.") + len("system\nBe brief.\n") + 2 if instruction == "keep" else 0
    for name in ("mini-base", "mini-distilled"):
        assert [after - before for after, before in zip(mine[name], r1[name], strict=True)] == [added - r1_words] * 4
    assert mine["teacher"] != r1["teacher"]


def test_transformers_scores_bases_and_students_too(student, run_dir):
    before = evaluate(recipe_of(student), run_dir, ALONE)
    samples = {path: path.read_bytes() for path in (run_dir / "eval").glob("*/samples.parquet")}
    manifest = evaluate(recipe_of(student, engine="transformers"), run_dir, ALONE)
    assert manifest.counts == {**before.counts, "asked": 2 * 6 * 2}
    changed = {path.parent.name for path, content in samples.items() if path.read_bytes() != content}
    assert changed == {"mini-base", "mini-distilled"}, "the teacher's own backend is the engine in both"
    for name in changed:
        scored = json.loads((run_dir / "eval" / name / "manifest.json").read_text())
        assert scored["counts"]["identity"]["backend"] == "transformers"
        (total, *_) = json.loads((run_dir / "eval" / name / "scores.json").read_text())
        assert (total["architecture"], total["num_parameters"]) == ("qwen2", total["num_active_parameters"])


def test_only_what_changed_is_scored_again(student, run_dir, bases):
    recipe = recipe_of(student)
    evaluate(recipe, run_dir, ALONE)
    before = stamps(run_dir)
    save_tiny_model(run_dir / "distill" / "mini-distilled", template="thinking", seed=2)
    evaluate(recipe, run_dir, ALONE)
    after = stamps(run_dir)
    changed = {Path(path).parent.name for path in after if after[path] != before.get(path)}
    assert "mini-distilled" in changed
    assert "mini-base" not in changed


def test_an_interrupted_run_resumes_to_the_same_scores(student, run_dir, tmp_path):
    recipe = recipe_of(student)
    evaluate(recipe, run_dir, ALONE)
    whole = {p.parent.name: p.read_bytes() for p in (run_dir / "eval").glob("*/samples.parquet")}
    (run_dir / "eval" / "manifest.json").unlink()
    (run_dir / "eval" / "mini-base" / "manifest.json").unlink()
    (run_dir / "eval" / "mini-base" / "scores.json").write_text("[")
    evaluate(recipe, run_dir, ALONE)
    assert {p.parent.name: p.read_bytes() for p in (run_dir / "eval").glob("*/samples.parquet")} == whole


def rows_of(run_dir: Path, name: str) -> dict[tuple[str, int], dict]:
    rows = pq.read_table(run_dir / "eval" / name / "samples.parquet").to_pylist()
    return {(row["problem_id"], row["sample_index"]): row for row in rows}


def test_more_samples_and_more_questions_ask_for_what_is_new_alone(student, run_dir):
    few = evaluate(recipe_of(student, limit=4), run_dir, ALONE)
    assert few.counts["asked"] == few.counts["samples"] == 3 * 4 * 2
    before = {name: rows_of(run_dir, name) for name in ("teacher", "mini-base", "mini-distilled")}
    more = evaluate(recipe_of(student, num_samples=5), run_dir, ALONE)
    assert more.counts["samples"] == 3 * 6 * 5
    assert more.counts["asked"] == 3 * (6 * 5 - 4 * 2)
    for name, rows in before.items():
        assert rows.items() <= rows_of(run_dir, name).items()
    assert evaluate(recipe_of(student, limit=4), run_dir, ALONE).counts["asked"] == 0


def test_what_changes_no_sample_scores_nobody_again(student, run_dir):
    recipe = recipe_of(student)
    evaluate(recipe, run_dir, ALONE)
    before = stamps(run_dir)
    faster = recipe_of(student, batch_size=3)
    teacher = recipe.teacher.model_copy(update={"batch_size": 2, "speculate": True})
    verify = recipe.verify.model_copy(update={"num_workers": 1, "relabel": "majority"})
    evaluate(faster.model_copy(update={"teacher": teacher, "verify": verify}), run_dir, ALONE)
    assert stamps(run_dir) == before
    elsewhere = student.parent / "elsewhere"
    shutil.copytree((student.parent / "teacher").resolve(), elsewhere)
    moved = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": str(elsewhere)})})
    evaluate(moved, run_dir, ALONE)
    changed = {path for path, stamp in stamps(run_dir).items() if before[path] != stamp}
    assert {str(Path(path).relative_to(run_dir)) for path in changed} <= {"eval/manifest.json", f"eval/{HELD_OUT}"}


def test_a_changed_teacher_leaves_the_students_scores(student, run_dir):
    recipe = recipe_of(student)
    evaluate(recipe, run_dir, ALONE)
    told = recipe.teacher.model_copy(update={"system_prompt": "Be brief."})
    again = evaluate(recipe.model_copy(update={"teacher": told}), run_dir, ALONE)
    assert again.counts["asked"] == 6 * 2
    alone = recipe_of(student, roles=["base", "distilled"])
    assert evaluate(alone.model_copy(update={"teacher": told}), run_dir, ALONE).counts["asked"] == 0
    whole = evaluate(alone, run_dir, ALONE)
    assert "teacher" not in whole.config


def test_a_lost_ledger_is_asked_for_again(student, run_dir, monkeypatch):
    recipe = recipe_of(student, roles=["base"])
    whole = evaluate(recipe, run_dir, ALONE)
    samples = (run_dir / "eval" / "mini-base" / "samples.parquet").read_bytes()
    (run_dir / "eval" / "mini-base" / "ledger.sqlite").unlink()
    monkeypatch.setattr(kept, "GRADING_VERSION", 99)
    shown = RecordedProgress()
    again = evaluate(recipe, run_dir, Context(Path(), shown, num_workers=1))
    assert again.counts == whole.counts
    assert "load mini-base" in shown.totals
    assert (run_dir / "eval" / "mini-base" / "samples.parquet").read_bytes() == samples


def test_a_held_out_question_in_the_training_set_is_an_error(student, run_dir):
    recipe = recipe_of(student)
    (leaked, *_) = load_problems([recipe.eval.held_out], base_dir=Path.cwd())
    path = run_dir / "curate" / "examples.parquet"
    write_records(path, [example("  " + leaked.prompt.replace(" ", "\n"))], Example)
    with pytest.raises(DataError, match=r"1 of 6 held-out questions occur among the training examples"):
        evaluate(recipe, run_dir, ALONE)
    assert not (run_dir / "eval" / "manifest.json").exists()


def test_an_untrained_student_is_one_line_and_nothing_written(student, tmp_path):
    with pytest.raises(DataError, match=r"mini-distilled: this student has not been trained yet"):
        evaluate(recipe_of(student), tmp_path / "tiny", Context(Path()))
    assert not (tmp_path / "tiny").exists()


def test_problems_of_one_s_own_are_a_suite(student, run_dir, tmp_path):
    """Asked and scored like any other, screened from training, and stopped where training has seen them."""
    rows = [{"prompt": f"How many are {n} and {n} apples, all told?", "answer": 2 * n} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mine = {"name": "mine", "problems": {"kind": "local", "path": str(tmp_path / "mine.jsonl")}}
    recipe = recipe_of(student, suites=["pico", mine], roles=["base"])
    manifest = evaluate(recipe, run_dir, ALONE)
    assert (manifest.counts["held_out"], manifest.counts["samples"]) == (6 + 3, (6 + 3) * 2)
    cards = json.loads((run_dir / "eval" / "mini-base" / "scores.json").read_text())
    counted = {
        card["suite"]: (card["num_questions"], card["num_samples"]) for card in cards if card["metric"] == "pass@1"
    }
    assert counted["mine"] == (3, 6)
    assert evaluate(recipe, run_dir, ALONE) == manifest
    asked = held_out_questions(recipe, Path(), {})()
    assert sorted(asked["mine"]) == sorted(row["prompt"] for row in rows)
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps({'prompt': '1 + 1 = ?', 'answer': 2})}\n")
    with pytest.raises(DataError, match=r"1 of 1 mine questions occur among the training examples"):
        evaluate(recipe, run_dir, ALONE)


def test_how_lm_eval_would_be_asked_is_nothing_to_others(student, run_dir):
    recipe = recipe_of(student, roles=["base"])
    manifest = evaluate(recipe, run_dir, ALONE)
    assert evaluate(recipe_of(student, roles=["base"], lm_eval={"num_fewshot": 3}), run_dir, ALONE) == manifest


class TeacherAndJudge(ChatEndpoint):
    """Writes something for every question; as a judge it prefers what it reads first, and fails from a request on."""

    fails_from, num_judged = 10**9, 0

    def _answer(self, payload: dict) -> Response:
        prompt = payload["messages"][-1]["content"]
        words = "There is much to say."
        if "carry the mark " in prompt:
            self.num_judged += 1
            if self.num_judged >= self.fails_from:
                return JSONResponse({"error": {"message": "gone"}}, 404)
            words = f"{prompt.split('carry the mark ', 1)[1].split('. ', 1)[0]} FIRST"
        choice = {"index": 0, "message": {"role": "assistant", "content": f"Hm.\n</think>\n\n{words}"}}
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        choices = [choice | {"finish_reason": "stop"}]
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": choices, "usage": usage})


def test_answers_without_reference_stand_beside_the_teacher_s(student, run_dir, tmp_path):
    rows = [{"prompt": f"Tell me of {thing}."} for thing in ("rivers", "bread", "clocks")]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mine = {"name": "mine", "problems": {"kind": "local", "path": str(tmp_path / "mine.jsonl"), "grader": "judge"}}
    with serving(TeacherAndJudge(model="both")) as endpoint:
        both = {"backend": "openai", "base_url": endpoint.url, "model": "both", "max_retries": 0, "max_concurrency": 1}
        asked_of = {"suites": ["pico", mine], "judge": {"teacher": both}, "roles": ["teacher", "base"]}
        given = recipe_of(student, num_samples=1, **asked_of)
        recipe = Recipe.model_validate({**given.model_dump(), "teacher": both})
        endpoint.fails_from = 3
        with pytest.raises(PotstillError, match="gone"):
            evaluate(recipe, run_dir, ALONE)
        assert not (run_dir / "eval" / "manifest.json").exists()
        endpoint.fails_from = 10**9
        evaluate(recipe, run_dir, ALONE)
        counts = json.loads((run_dir / "eval" / "retention" / "manifest.json").read_text())["counts"]
        assert counts == {"verdicts": 6, "asked": 4}, "two had been said before the stop"
        num_payloads = len(endpoint.payloads)
        evaluate(recipe, run_dir, ALONE)
        assert len(endpoint.payloads) == num_payloads
    comparison = compare_run(run_dir)
    (row,) = comparison.retention
    assert (row["suite"], row["model"], row["judge"]) == ("mine", "mini-base", "both")
    assert (row["wins"], row["ties"], row["losses"], row["num_questions"]) == (0, 3, 0, 3)
    assert [suite.name for suite in comparison.suites] == ["pico"], "it is not ranked"
    assert summary(comparison, comparison.stages)["retention"] == [row]
    assert "| mine | mini-base | 50.0" in summary_markdown(comparison, comparison.stages)


@pytest.mark.slow
def test_lm_evals_own_tasks_stand_beside_ours(student, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    write_arc(tmp_path, count=5)
    recipe = recipe_of(student, suites=["lm_eval:arc_challenge", "pico"], roles=["base", "distilled"])
    recipe = recipe.model_copy(update={"bench_data": str(tmp_path)})
    manifest = evaluate(recipe, run_dir, ALONE)
    assert manifest.counts["asked"] == 2 * (6 * 2 + 5 * 4)
    folder = run_dir / "eval" / "mini-base"
    cards = json.loads((folder / "scores.json").read_text())
    assert {(card["suite"], card["metric"]) for card in cards if "/" not in card["suite"]} == {
        ("pico", "pass@1"),
        ("pico", "pass@2"),
        ("lm_eval:arc_challenge", "acc,none"),
        ("lm_eval:arc_challenge", "acc_norm,none"),
    }
    assert len((folder / "lm_eval" / "arc_challenge.jsonl").read_text().splitlines()) == 5
    before = stamps(run_dir)
    evaluate(recipe, run_dir, ALONE)
    assert stamps(run_dir) == before
    monkeypatch.setattr(kept, "GRADING_VERSION", 99)  # grades what is kept: lm-eval's scores stay
    assert evaluate(recipe, run_dir, ALONE).counts["asked"] == 0
    assert json.loads((folder / "scores.json").read_text()) == cards
    comparison = compare_run(run_dir, recipe.deciding_suite)
    assert [suite.name for suite in comparison.suites] == ["pico"]
    assert scores_csv(comparison).count("lm_eval:arc_challenge") == 2 * 2
    assert r"| arc\_challenge | acc\_norm,none |" in summary_markdown(comparison, [])
    (data,) = tmp_path.glob("lm_eval/*/*/*/test.jsonl")
    data.write_text(data.read_text() + data.read_text().replace("melts", "thaws").splitlines()[0] + "\n")
    again = evaluate(recipe, run_dir, ALONE)
    assert again.counts["asked"] == 2 * 4, "one question is new"
    alone = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"suites": ("lm_eval:arc_challenge",)})})
    assert evaluate(alone, run_dir, ALONE).counts["asked"] == 0
    with pytest.raises(DataError, match="only lm-eval's tasks were scored"):
        compare_run(run_dir, recipe.deciding_suite)


def note_gpus(path: Path, progress: Progress) -> None:
    path.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


@pytest.mark.slow
def test_models_share_out_the_gpus(student, run_dir, tmp_path):
    """Places are of whole models; every process sees its own alone, and what it scores is what one alone scores."""
    assert [place["CUDA_VISIBLE_DEVICES"] for place in _places(("2", "3", "5", "7", "9"), 2)] == ["2,3", "5,7"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in _places(("0", "1"), 8)] == ["0,1"]
    assert _places(("0", "1"), 0) == [{}], "an endpoint needs none"
    jobs = [(str(number), tmp_path / f"{number}.txt") for number in range(4)]
    run_side_by_side(note_gpus, jobs, 2, num_threads=1, progress=silent(), environments=_places(("4", "6"), 1))
    assert {path.read_text() for _, path in jobs} == {"4", "6"}
    recipe = recipe_of(student)
    evaluate(recipe, run_dir, ALONE)
    alone = {path.parent.name: path.read_bytes() for path in (run_dir / "eval").glob("*/samples.parquet")}
    shutil.rmtree(run_dir / "eval")
    assert evaluate(recipe, run_dir, Context(Path(), gpus=("4", "6"))).counts["models"] == 3
    assert {path.parent.name: path.read_bytes() for path in (run_dir / "eval").glob("*/samples.parquet")} == alone
