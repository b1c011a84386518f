"""The task files through the real lm-eval evaluator, on real benchmark files, with a model that follows a script."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.problems.benchmark import read_benchmark
from distill.recipe import ContestDates, VerifyConfig
from distill.records import Problem, Sampling
from distill.tables import read_records, write_records
from distill.verify import open_verifier
from eval.harness import score_rows, task_config
from eval.suites import SUITES, check_suites
from eval.tasks.processors import documents, grade
from tests.eval.scripted import SUBJECT, Scripted, scored

BENCH_DATA = os.environ.get("POTSTILL_BENCH_DATA")
needs_data = pytest.mark.skipif(not BENCH_DATA, reason="POTSTILL_BENCH_DATA is not set")


@needs_data
@pytest.mark.parametrize(
    ("suite", "questions", "repeats"), [("gsm8k", 1319, 1), ("math500", 500, 4), ("aime24", 30, 64), ("aime25", 30, 64)]
)
def test_benchmarks_follow_r1s_protocol(suite, questions, repeats, tmp_path):
    limit = min(questions, 10)
    model = Scripted(lambda question, sample: question % 2 == 0)
    cards, _ = scored(model, [suite], tmp_path, seed=3, limit=limit, bench_data=Path(BENCH_DATA))
    total = cards[0]
    assert (total.suite, total.metric, total.value) == (suite, "pass@1", 0.5)
    assert (total.num_questions, total.num_samples) == (limit, limit * repeats)
    whole = [card.metric for card in cards if "/" not in card.suite]
    several = [f"pass@{1 << power}" for power in range(1, 7) if 1 << power <= repeats]
    assert whole == ["pass@1", *several] + ([f"cons@{repeats}"] if repeats >= 4 else [])
    assert model.sampling == Sampling(temperature=0.6, top_p=0.95, max_tokens=32_768, seed=3)
    assert len({request.seed(model.sampling) for request in model.seen}) == limit * repeats, "k samples, k seeds"
    instruction = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert all(request.problem.prompt.endswith(instruction) for request in model.seen)
    assert len(read_benchmark(suite, "test", Path(BENCH_DATA))) == questions


@needs_data
def test_programs_are_asked_for_as_the_question_says(tmp_path):
    for suite, repeats in (("humaneval", 8), ("mbpp", 4)):
        model = Scripted(lambda *_: True)
        cards, _ = scored(model, [suite], tmp_path, seed=3, limit=3, bench_data=Path(BENCH_DATA))
        assert (cards[0].num_questions, cards[0].num_samples) == (3, 3 * repeats)
        assert all(request.problem.prompt.endswith("one ```python block.") for request in model.seen)


def test_a_letter_is_asked_for_and_dates_choose(tmp_path):
    row = {"question": "Which?", "choices": {"text": ["air", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "arc_challenge_test.jsonl").write_text(json.dumps(row) + "\n")
    contests = [
        {"question_content": f"Print {month}.", "difficulty": "easy", "contest_date": f"2024-{month:02}-01"}
        | {name: json.dumps([{"input": "", "output": f"{month}"}]) for name in ("public_test_cases",)}
        | {"private_test_cases": "[]"}
        for month in (6, 9)
    ]
    (tmp_path / "livecodebench.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in contests))
    model, dates = Scripted(lambda *_: True), ContestDates.model_validate({"first": "2024-08-01"})
    suites = ["arc_challenge", "livecodebench"]
    cards, _ = scored(model, suites, tmp_path / "out", seed=3, bench_data=tmp_path, contest_dates=dates)
    counted = {card.suite: (card.num_questions, card.num_samples) for card in cards}
    assert counted == {"arc_challenge": (1, 2), "livecodebench": (1, 16)}
    assert {request.problem.prompt.partition("\n")[0] for request in model.seen} == {"Print 9."}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_its_task_file_and_samples_enough(suite):
    """Sampling alone adds at most 1.4 points to the standard error (`_r1_protocol.yaml`), and not for nothing."""
    sizes = {"gsm8k": 1_319, "math500": 500, "aime24": 30, "aime25": 30, "gpqa_diamond": 198, "mmlu_pro": 12_032}
    sizes |= {"arc_challenge": 1_172, "arc_easy": 2_376, "mbpp": 500, "humaneval": 164, "humaneval_plus": 164}
    config = task_config(suite)
    assert (config["task"], config["num_fewshot"], config["metadata"]) == (suite, 0, {"version": 1.1})
    if suite in sizes:
        repeats = config["repeats"]
        assert repeats * sizes[suite] >= 1_280
        assert repeats == 1 or repeats * sizes[suite] < 2 * 1_280


@needs_data
def test_the_real_grader_scores_real_answers(tmp_path):
    with open_verifier(VerifyConfig(num_workers=1)) as verifier:
        for suite, asked in (("math500", 12), ("gsm8k", 12)):
            model = Scripted(lambda question, sample: question < 9)
            how = {"seed": 1, "limit": asked, "num_samples": 1, "bench_data": Path(BENCH_DATA)}
            (card, *_), _ = scored(model, [suite], tmp_path, verifier=verifier, **how)
            assert card.value == 9 / 12


@pytest.fixture
def held_out(tmp_path) -> Path:
    problems = [
        Problem(
            prompt=f"{{{{ {i} }}}} + 1 = ?\n",
            answer=str(i + 1),
            grader="reasoning_gym",
            source="gcd",
            metadata={"i": i} | ({"family": "sums"} if i % 2 else {}),  # before the source, where it is given
        )
        for i in range(8)
    ]
    path = tmp_path / "held_out.parquet"
    write_records(path, problems, Problem)
    return path


def test_pico_scores_totals_families_and_samples(held_out, tmp_path):
    import pyarrow.parquet as pq

    model = Scripted(lambda question, sample: question % 2 == 0 or sample == 0)
    sampling = Sampling(temperature=0.9, top_p=0.8, max_tokens=77, seed=5)
    cards, _ = scored(model, ["pico"], tmp_path / "out", seed=5, num_samples=4, sampling=sampling, held_out=held_out)
    values = {(card.suite, card.metric): card.value for card in cards}
    assert values == {
        ("pico", "pass@1"): (4 * 1 + 4 * 0.25) / 8,
        ("pico", "pass@2"): (4 * 1 + 4 * 0.5) / 8,
        ("pico", "pass@4"): 1.0,
        ("pico", "cons@4"): pytest.approx((4 * 1 + 4 * 0.25) / 8),  # four different answers tie
        ("pico/gcd", "pass@1"): 1.0,
        ("pico/sums", "pass@1"): 0.25,
    }
    assert model.sampling == sampling
    assert model.seen[0].problem == read_records(held_out, Problem)[0], "the prompt reaches the model untouched"
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert len(rows) == 32
    assert {(row["problem_id"], row["sample_index"]) for row in rows} == {
        (p.id, k) for p in read_records(held_out, Problem) for k in range(4)
    }
    assert json.loads((tmp_path / "out" / "scores.json").read_text())[0]["value"] == values["pico", "pass@1"]


def row(problem: str, verdict: str, extracted: str | None = None) -> dict:
    return {"problem_id": problem, "family": "f", "verdict": verdict, "extracted": extracted, "vote": extracted}


def test_truncated_is_not_correct_and_our_failures_are_not_wrong():
    rows = [row("p", "correct", "1"), row("p", "truncated"), row("q", "correct", "1"), row("q", "infra_error")]
    (card,) = score_rows([*rows, *[row(f"r{i}", "correct", "1") for i in range(60)]], SUBJECT, "s")
    assert card.value == (0.5 + 1 + 60) / 62
    assert (card.num_questions, card.num_samples) == (62, 63)
    with pytest.raises(EnvironmentFault, match=r"1 of 4 answers could not be graded.*at most 2%"):
        score_rows(rows, SUBJECT, "s")


def test_references_that_nobody_can_read_stop_a_suite_above_a_share():
    rows = [row(f"r{i}", "correct", "1") for i in range(36)]
    rows += [row("u", "unverifiable", "1") | {"answer": "\\frac{"}] * 4
    card, *_ = score_rows(rows, SUBJECT, "s", max_unverifiable=0.1)
    assert (card.value, card.num_samples) == (36 / 37, 40)
    with pytest.raises(DataError, match=r"s: 4 of 40 answers .* cannot be read, the first is '\\\\frac\{'; at most 5%"):
        score_rows(rows, SUBJECT, "s")


def test_overrides_reach_the_protocol_and_defaults_stay():
    assert task_config("aime24")["repeats"] == 64
    assert task_config("aime24", num_samples=2)["repeats"] == 2
    assert "boxed" in task_config("gsm8k")["doc_to_text"]
    assert task_config("gsm8k", question_alone=True)["doc_to_text"] == "{{question}}"
    greedy = task_config("math500", sampling=Sampling(temperature=0, max_tokens=8))["generation_kwargs"]
    assert (greedy["do_sample"], greedy["max_gen_toks"], greedy["until"]) == (False, 8, [])


def test_a_suite_that_there_is_not_is_named():
    check_suites(("pico", "aime24"))
    with pytest.raises(RecipeError, match=r"eval.suites: unknown suite 'aime42'; did you mean 'aime2"):
        check_suites(("aime42",))


def test_lm_eval_stays_quiet(held_out, tmp_path, capfd):
    scored(Scripted(lambda *_: True), ["pico"], tmp_path, seed=1, held_out=held_out)
    assert capfd.readouterr() == ("", "")


def test_answers_of_lm_evals_own_models_are_graded_too():
    """Plain strings, as `lm_eval --model vllm --include_path eval/tasks` hands them over, no verdict attached."""
    problem = Problem(prompt="What is 1/2 + 1/4?", answer="\\frac{3}{4}", grader="math", source="math500")
    doc = documents([problem])["test"][0]
    written = ["\\boxed{0.75}", "<think>\n</think>\n\\boxed{3/4}", "\\boxed{2}", "no answer at all"]
    assert grade(doc, [written])["pass@1"] == 0.5
