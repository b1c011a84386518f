"""The small scale on two cores: published models through the whole chain, from traces to a pushed student."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.curate import GradedTrace
from distill.records import Example, Problem, Sampling, ScoreCard, Trace, TraceRequest
from distill.tables import read_records
from teacher.backends import open_student
from tests.pipelines.tiny_world import potstill
from tests.published_models import published
from tests.repository import REPOSITORY
from tests.students.loopback_hub import TOKEN, loopback_hub

TEACHER, STUDENT = "Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M-Instruct"
NAME = "smollm2-135m-instruct"
SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
# One step each: the smallest model that can teach gets most of them right.
LEARNED = [(a, b) for a in (12, 23, 34) for b in (5, 16, 27, 41)]
ASKED = [(a, b) for a in (18, 45) for b in (7, 21, 33, 52)]


def sums(pairs: list[tuple[int, int]]) -> str:
    rows = [{"prompt": f"Ann has {a} apples and buys {b} more. How many?", "answer": str(a + b)} for a, b in pairs]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: models/, questions, and small-cpu.yaml made smaller still."""
    folders = [published(name) for name in (TEACHER, STUDENT)]
    world = tmp_path_factory.mktemp("small")
    (world / "models").mkdir()
    for folder in folders:
        (world / "models" / folder.name).symlink_to(folder)
    (world / "learned.jsonl").write_text(sums(LEARNED), encoding="utf-8")
    (world / "asked.jsonl").write_text(sums(ASKED), encoding="utf-8")
    recipe = {
        "extends": str(REPOSITORY / "pipelines/recipes/small-cpu.yaml"),
        "name": "sums",
        "problems": [{"kind": "local", "path": "learned.jsonl"}],
        "generate": {"num_samples": 1, "sampling": {"temperature": 0.3, "max_tokens": 224}},
        "distill": {
            "methods": ["distilled"],
            "students": [NAME],
            # 7 to 12 examples are two steps of 6.
            "overrides": {"lr": 3e-4, "num_epochs": 1, "batch_size": 6, "micro_batch_size": 6, "dtype": "float32"},
        },
        "eval": {
            "suites": ["held_out"],
            "held_out": {"kind": "local", "path": "asked.jsonl"},
            "roles": ["base", "distilled"],
            "num_samples": 1,
            "sampling": {"max_tokens": 32},
        },
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return world


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    for command in ("generate", "distill", "eval"):
        done = potstill(command, "recipe.yaml", cwd=world, timeout_s=1_500)
        assert done.returncode == 0, done.stderr
    return world / "runs" / "sums"


pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def test_the_traces_that_are_learned_are_right_and_have_the_agreed_form(run: Path) -> None:
    problems = {problem.id: problem for problem in read_records(run / "generate/problems.parquet", Problem)}
    traces = {trace.key: trace for trace in read_records(run / "generate/traces", Trace)}
    states = {one.key: one.state for one in read_records(run / "curate/verdicts.parquet", GradedTrace)}
    assert (len(problems), len(traces)) == (len(LEARNED), len(LEARNED))
    examples = list(read_records(run / "curate/examples.parquet", Example))
    assert 7 <= len(examples) <= 12
    for example in examples:
        question = problems[example.problem_id]
        trace = traces[example.trace_key]
        assert states[example.trace_key] == "correct"
        assert example.question == f"{question.prompt}\n\n{SUFFIX}"
        thought, answer = example.completion.split("</think>")
        assert thought == f"<think>\n{trace.text}\n"
        assert answer == f"\n\n\\boxed{{{question.answer}}}"
        a, b = map(int, re.findall(r"\d+", question.prompt))
        assert str(a + b) in trace.text


def test_two_steps_changed_the_weights_and_nothing_else(run: Path) -> None:
    student, base = run / "distill" / f"{NAME}-distilled", published(STUDENT)
    log = json.loads((student / "train_log.json").read_text(encoding="utf-8"))
    assert len(log["steps"]) == 2
    assert all(math.isfinite(step["loss"]) and 0 < step["loss"] < 10 for step in log["steps"])
    before, after = load_file(base / "model.safetensors"), load_file(student / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert len(moved) > 0.9 * len(before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    config, old = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (student, base))
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    assert {name: config[name] for name in shape} == {name: old[name] for name in shape}


def test_base_and_student_are_scored_on_eight_questions(run: Path) -> None:
    for name, role in ((f"{NAME}-base", "base"), (f"{NAME}-distilled", "distilled")):
        cards = json.loads((run / "eval" / name / "scores.json").read_text(encoding="utf-8"))
        total = ScoreCard.model_validate(cards[0])
        assert (total.role, total.suite, total.num_questions, total.num_samples) == (role, "held_out", 8, 8)
        assert total.num_parameters == 134_515_008


def greedy(folder: Path, question: str) -> str:
    [done] = open_student(folder, engine="native", batch_size=1).generate(
        [TraceRequest(problem=Problem(prompt=question, answer="1", grader="math", source="t"), sample_index=0)],
        Sampling(temperature=0, top_p=1, max_tokens=24),
    )
    return done.text


def test_the_pushed_folder_answers_as_the_student_does(run: Path, world: Path) -> None:
    """From the Hub's side: card, licence, and greedy tokens by transformers that are ours before the push."""
    environment = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(world / "home"), "HF_TOKEN": TOKEN}
    with loopback_hub(world / "hub") as hub:
        done = potstill("push", "recipe.yaml", cwd=world, HF_ENDPOINT=hub.url, **environment)
        assert done.returncode == 0, done.stderr
        assert len(hub.commits) == 1
    stored = world / "hub" / "tester" / f"potstill-{NAME}"
    card = ModelCard.load(stored / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert card.data.eval_results[0].dataset_type == "held_out"
    assert f"a blank line and `{SUFFIX}` behind the question" in card.text
    assert (stored / "LICENSE").read_bytes() == (published(STUDENT) / "LICENSE").read_bytes()
    question = f"Ann has 18 apples and buys 7 more. How many?\n\n{SUFFIX}"
    tokenizer = AutoTokenizer.from_pretrained(stored)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    written = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    text = greedy(run / "distill" / f"{NAME}-distilled", question)
    assert text == f"<think>\n{tokenizer.decode(written, skip_special_tokens=True)}"
