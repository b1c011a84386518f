"""The model card says what the run says, in front matter that huggingface_hub reads back; what is pushed is listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.errors import RecipeError
from distill.publish.origin import UNNAMED, published_name
from distill.recipe import Instruction
from distill.records import ScoreCard
from students.publish.card import Lineage, model_card
from students.publish.hub import check_repo_name, lay_out, tree
from students.zoo import find_student

LINEAGE = Lineage(
    recipe="pico",
    teacher="potstill's `pico`",
    problems="reasoning-gym, 4,096 problems, seed 1, split train",
    funnel=[{"filter": "correct", "in": 8192, "out": 7900}, {"filter": "deduplicate", "in": 7900, "out": 7000}],
    hashes={"base": "b" * 64, "examples": "e" * 64},
    versions={"trl": "1.16.0"},
)


def score(name: str, role: str, value: float, suite: str = "pico") -> ScoreCard:
    return ScoreCard(
        name=name,
        role=role,
        architecture="qwen2",
        num_parameters=200_000,
        num_active_parameters=200_000,
        suite=suite,
        metric="pass@1",
        value=value,
        stderr=0.01,
        ci95=(value - 0.02, value + 0.02),
        num_questions=400,
        num_samples=4,
    )


def log_of(student, method="distilled"):
    return {
        "method": method,
        "seed": 17,
        "num_examples": 7000,
        "num_tokens": 3_000_000,
        "num_completion_tokens": 2_000_000,
        "num_steps": 875,
        "seconds": 61.5,
        "tokens_per_s": 48_780.5,
        "student": student.model_dump(mode="json"),
        "steps": [{"step": 1, "loss": 2.5}, {"step": 875, "loss": 0.125}],
    }


def test_the_card_carries_lineage_scores_recipe_and_licence():
    student = find_student("r1-distill-qwen-1.5b")
    own, beside = score(f"{student.name}-distilled", "distilled", 0.7214), score(student.name, "base", 0.05)
    text = model_card("me/potstill-qwen", student, log_of(student), [beside, own], LINEAGE)
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "Qwen/Qwen2.5-Math-1.5B")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("pico", "pass@1", 72.14)
    assert "| **r1-distill-qwen-1.5b-distilled** (distilled) | pico | pass@1 | 72.1 | 70.1 to 74.1 | 400 x 4 |" in text
    assert text.index("72.1") < text.index("| r1-distill-qwen-1.5b (base) | pico | pass@1 | 5.0 | 3.0 to 7.0 |")
    assert "4. Traces: 8,192 -> correct 7,900 -> deduplicate 7,000" in text
    assert f"| examples | `{'e' * 64}` |" in text
    assert "| steps, seed | 875, 17 |" in text
    assert "top-p 0.95, without a system prompt.\n" in text


def test_the_card_tells_of_questions_that_a_teacher_wrote_and_of_hints():
    student = find_student("r1-distill-qwen-1.5b")
    written = [{"filter": "readable", "in": 900, "out": 640}, {"filter": "same_answer", "in": 640, "out": 512}]
    told = model_card("x", student, log_of(student), [], replace(LINEAGE, questions={"tales": written}, num_hinted=37))
    assert "   - tales: 900 questions asked for -> readable 640 -> same answer 512" in told
    assert "5. 37 of the examples are second tries, asked with the reference as a hint" in told


def test_the_card_says_how_a_student_that_learned_with_an_instruction_is_asked():
    student = find_student("r1-distill-qwen-1.5b")
    lineage = replace(LINEAGE, instruction=Instruction(system_prompt="Be brief.", prompt_suffix="Box it."))
    text = model_card("me/x", student, log_of(student), [], lineage)
    assert "with the system prompt `Be brief.`, and with a blank line and `Box it.` behind the question." in text


def test_cards_and_logs_name_published_bases_and_never_a_path(tmp_path):
    """A base in somebody's home, one that the Hub's cache holds, one that says what it was made from."""
    cached = tmp_path / "hub/models--Qwen--Qwen2.5-0.5B/snapshots/0ab"
    own, tuned = tmp_path / "home/me/secret-base", tmp_path / "home/me/tuned"
    for folder, source in ((cached, None), (own, str(tmp_path)), (tuned, "HuggingFaceTB/SmolLM2-135M")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"_name_or_path": source}))
    for base, name, repository in (
        (cached, "`Qwen/Qwen2.5-0.5B`", "Qwen/Qwen2.5-0.5B"),
        (own, "a local checkpoint", None),
        (tuned, "a local checkpoint, made from `HuggingFaceTB/SmolLM2-135M` by its config.json", None),
        (tmp_path / "gone", "a local checkpoint", None),
    ):
        template = str(tmp_path / "mine.jinja")
        student = find_student("qwen2-0.2m").model_copy(update={"base": str(base), "chat_template": template})
        card = model_card("me/x", student, log_of(student), [], LINEAGE)
        assert f"fine-tuned from {name} on" in card
        assert ModelCard(card).data.base_model == repository
        checkpoint = tmp_path / f"checkpoint-{base.name}"
        checkpoint.mkdir()
        (checkpoint / "train_log.json").write_text(json.dumps(log_of(student)))
        lay_out(checkpoint, card, tmp_path / "out")
        assert tree(checkpoint, card) == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
        logged = json.loads((tmp_path / "out/train_log.json").read_text())["student"]
        assert (logged["base"], logged["chat_template"]) == (name.replace("`", ""), "mine.jinja")
        assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_models_are_named_as_they_are_known(tmp_path):
    here = Path()
    assert published_name("teacher/pico", here / "teacher/pico") == "potstill's `pico`"
    assert published_name("students/pico/qwen2-0.2m", here / "students/pico/qwen2-0.2m") == "potstill's `qwen2-0.2m`"
    assert published_name("deepseek-ai/DeepSeek-R1", tmp_path / "none") == "`deepseek-ai/DeepSeek-R1`"
    assert published_name("r1", tmp_path / "none") == "`r1`"
    assert published_name("/models/DeepSeek-R1", tmp_path / "none") == "a local checkpoint"
    assert published_name("../x/y", tmp_path / "none") == published_name("~/x", tmp_path / "none") == UNNAMED


def test_a_bundled_base_is_no_repository_and_llama_is_named():
    pico, llama = find_student("qwen2-0.2m"), find_student("r1-distill-llama-8b")
    assert ModelCard(model_card("x", pico, log_of(pico), [], LINEAGE)).data.base_model is None
    assert "Built with Llama" in model_card("Llama-x", llama, log_of(llama), [], LINEAGE)
    check_repo_name("me/Llama-potstill-8b", llama)
    with pytest.raises(RecipeError, match=r"push\.repo: the licence llama3\.1 asks for a name that begins with Llama"):
        check_repo_name("me/potstill-8b", llama)
    with pytest.raises(RecipeError, match=r"push\.repo: not a repository name"):
        check_repo_name("me/two words", pico)


def test_a_licence_that_the_hub_has_no_name_for_is_written_as_the_hub_wants_it():
    student = find_student("qwen2.5-3b")
    log = {**log_of(student), "num_dropped": 12, "num_dropped_tokens": 60_000}
    text = model_card("x", student, log, [], LINEAGE)
    card = ModelCard(text)
    assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
    assert "8,192 tokens at most; nothing was cut, 12 longer ones (60,000 tokens) were left out" in text


def test_what_is_laid_out_is_what_the_tree_says(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, size in (("config.json", 3), ("model.safetensors", 1000), ("manifest.json", 5), ("README.md", 7)):
        (folder / name).write_bytes(b"x" * size)
    readme = "# A card, with ÷\n"
    lay_out(folder, readme, tmp_path / "out")
    listed = tree(folder, readme)
    assert listed == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert list(listed) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_bytes() == b"x" * 7
