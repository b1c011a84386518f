"""Making a teacher: real runs of a few steps on the CPU, from the corpus to a folder that the backend opens."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from distill.errors import TrainingFailure
from distill.packing import Rows
from distill.problems.split import split_of
from distill.problems.stream import pico_families
from distill.progress import silent
from distill.recipe import NativeTeacher
from distill.records import Problem, Sampling, TraceRequest
from distill.verify import extract_answer
from teacher.backends import open_teacher
from teacher.model.checkpoint import load_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.train.config import PretrainConfig
from teacher.train.corpus import ASSISTANT, BOS, EOS, PAD, USER, build_corpus, make_tokenizer
from teacher.train.make import held_out_accuracy, load_pretrain_config, make_teacher
from teacher.train.pretrain import Pretraining
from tests.repository import REPOSITORY

VOCAB_SIZE = 512
ROW_LENGTH = 256
NUM_PROBLEMS = 1_600  # one chunk of the corpus: 200 of each family
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}


def config_of(**changes: Any) -> PretrainConfig:
    fields = {
        "architecture": TINY,
        "vocab_size": VOCAB_SIZE,
        "num_problems": NUM_PROBLEMS,
        "row_length": ROW_LENGTH,
        "rows_per_step": 4,
        "num_steps": 60,
        "lr": 5e-3,
        "warmup_steps": 5,
    }
    return PretrainConfig.model_validate(fields | changes)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(vocab_size=VOCAB_SIZE, seed=17, per_family=100)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Rows:
    return corpus(tokenizer, num_workers=1)


def corpus(tokenizer: Tokenizer, num_workers: int, num_problems: int = NUM_PROBLEMS, seed: int = 17) -> Rows:
    return build_corpus(
        tokenizer,
        num_problems=num_problems,
        facts_share=0.1,
        row_length=ROW_LENGTH,
        seed=seed,
        num_workers=num_workers,
    )


def trained(rows: Rows, *, spoil: Any = None, **changes: Any) -> Pretraining:
    config = config_of(**changes)
    architecture = DeepseekV3Config.model_validate({"vocab_size": VOCAB_SIZE, **config.architecture})
    generator = torch.Generator().manual_seed(config.seed)
    model = initialise(DeepseekV3(architecture), generator=generator)
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    run = Pretraining(model, rows, config, device=torch.device("cpu"))
    run.run(silent())
    return run


# --- corpus -----------------------------------------------------------------------------------------------------------


def documents(rows: Rows, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Context and target of every document, decoded."""
    bos, pad = tokenizer.token_to_id(BOS), tokenizer.token_to_id(PAD)
    found = []
    for ids, is_target in zip(rows.ids, rows.is_target, strict=True):
        starts = [*np.flatnonzero(ids == bos).tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            document, target = ids[start:end], is_target[start:end]
            context = document[~target & (document != pad)]
            found.append(
                tuple(
                    tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in (context, document[target])
                )
            )
    return found


def test_the_corpus_holds_training_side_problems_alone(rows: Rows, tokenizer: Tokenizer) -> None:
    found = documents(rows, tokenizer)
    questions = [context.removeprefix(BOS + USER).removesuffix(ASSISTANT) for context, _ in found if USER in context]
    assert len(questions) == NUM_PROBLEMS
    assert {split_of(question) for question in questions} == {"train"}
    assert {question.split()[0] for question in questions} >= {"State", "Solve", "Find", "Your", "Multiply", "Simplify"}


def test_the_loss_is_on_the_solution_and_on_facts(rows: Rows, tokenizer: Tokenizer) -> None:
    facts = 0
    for context, target in documents(rows, tokenizer):
        assert target.endswith(EOS)
        if context == BOS:
            facts += 1
            assert "<think>" not in target
            assert "boxed" not in target
        else:
            assert context.startswith(BOS + USER)
            assert context.endswith(ASSISTANT)
            assert re.fullmatch(r"<think>\n(.+\n)+</think>\n\n\\boxed\{.+\}", target.removesuffix(EOS))
    assert facts == round(NUM_PROBLEMS * 0.1 / 0.9)


def test_a_solution_stands_beside_its_own_question(rows: Rows, tokenizer: Tokenizer) -> None:
    checked = 0
    for context, target in documents(rows, tokenizer):
        if "State the final answer" in context:
            expression = context.partition("problem: ")[2].partition(" =")[0]
            terms = [int(term) for term in re.findall(r"-?\d+", expression.replace("- ", "-"))]
            assert extract_answer(target.removesuffix(EOS)) == str(sum(terms))
            checked += 1
    assert checked == NUM_PROBLEMS // len(pico_families())


def test_the_corpus_depends_on_the_seed_and_not_on_the_workers(tokenizer: Tokenizer) -> None:
    one, two = (corpus(tokenizer, num_workers, 2 * NUM_PROBLEMS) for num_workers in (1, 2))
    assert np.array_equal(one.ids, two.ids)
    assert np.array_equal(one.is_target, two.is_target)
    other = corpus(tokenizer, 1, seed=18)
    assert other.ids[:50].tobytes() != one.ids[:50].tobytes()


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(rows: Rows) -> Pretraining:
    return trained(rows)


def test_losses_fall_and_the_log_says_how(run: Pretraining) -> None:
    first, *_, last = run.log
    assert [row["step"] for row in run.log] == [0, 50, 59]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["mtp_loss"] < 0.8 * first["mtp_loss"]
    assert first["loss"] == pytest.approx(np.log(VOCAB_SIZE), rel=0.05)
    for row in run.log:
        assert 1 <= row["max_load"] <= TINY["n_routed_experts"]
        assert row["tokens_per_s"] > 0
        assert row["grad_norm"] > 0
        assert row["balance_loss"] > 0
    assert first["lr"] == pytest.approx(5e-3 / 5)
    assert last["lr"] == pytest.approx(5e-3 * 0.02, rel=0.1)


def test_equal_seeds_give_equal_weights(rows: Rows) -> None:
    one, two, other = (trained(rows, num_steps=4, seed=seed) for seed in (3, 3, 4))
    states = [made.model.state_dict() for made in (one, two, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def plant_nan(model: DeepseekV3) -> None:
    model.lm_head.weight[3, 5] = float("nan")


@pytest.mark.parametrize("changes", [{"lr": 3e37, "warmup_steps": 0}, {"spoil": plant_nan}])
def test_a_loss_that_is_not_finite_ends_the_run(rows: Rows, changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingFailure, match=r"lr: the loss is (nan|inf).* at step \d+; lower lr") as caught:
        trained(rows, num_steps=3, **changes)
    assert caught.value.exit_code == 4


def crowd(model: DeepseekV3) -> None:
    """Send most tokens of every layer to the same two experts."""
    for router in model.routers():
        router.e_score_correction_bias[:2] = 0.15


def test_bias_updates_relieve_crowded_experts(rows: Rows) -> None:
    still = {"lr": 1e-12, "warmup_steps": 0, "num_steps": 60, "rows_per_step": 1, "spoil": crowd}
    frozen, balanced = (trained(rows, bias_speed=speed, **still) for speed in (0.0, 5e-3))
    for router in frozen.model.routers():
        assert router.e_score_correction_bias.tolist() == pytest.approx([0.15] * 2 + [0.0] * 6)
    for router in balanced.model.routers():
        bias = router.e_score_correction_bias
        assert bias[:2].max() < bias[2:].min() + 0.05
    assert frozen.log[-1]["max_load"] > 3
    assert balanced.log[0]["max_load"] == frozen.log[0]["max_load"]
    assert balanced.log[-1]["max_load"] < 0.7 * frozen.log[-1]["max_load"]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "teacher"
    out.mkdir()
    (out / "of an older one").write_text("x")
    config = config_of(num_steps=12, rows_per_step=2)
    return make_teacher(config, out, num_workers=1, held_out_per_family=1, progress=silent())


def test_a_teacher_is_a_whole_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]  # nothing half-made beside it
    model = load_checkpoint(folder)
    assert model.config.hidden_size == 64
    assert model.config.eos_token_id == Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(EOS)


def test_its_weights_are_fp8_with_scales(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    scaled = [name for name in kinds if name.endswith(".weight_scale_inv")]
    assert scaled
    for name, kind in kinds.items():
        assert (kind == "F8_E4M3") == (name + "_scale_inv" in kinds), name
    assert any(".experts." in name for name in scaled)
    assert any(name.startswith("model.layers.2.") for name in scaled)  # the MTP module's


def test_the_native_backend_opens_it(folder: Path) -> None:
    teacher = open_teacher(NativeTeacher(model=folder.name, batch_size=2), base_dir=folder.parent)
    problem = Problem(prompt="What is 3 * 4?", answer="12", grader="math", source="test")
    (done,) = teacher.generate([TraceRequest(problem=problem, sample_index=0)], Sampling(max_tokens=5))
    teacher.close()
    assert done.text.startswith("<think>\n")
    assert 1 <= done.num_tokens <= 5


def test_held_out_accuracy_counts_right_answers(folder: Path) -> None:
    """The bundled teacher has 98.8% of these right, one after twelve steps of training none."""
    learned = held_out_accuracy(REPOSITORY / "teacher/pico", per_family=2)
    begun = held_out_accuracy(folder, per_family=1)
    assert set(learned) == set(begun) == set(pico_families())
    assert sum(learned.values()) >= 0.75 * len(learned)  # 12 of 16: a chance of one in 10**7 to fall below
    assert set(begun.values()) == {0.0}


def test_card_and_log_say_how_it_was_made(folder: Path) -> None:
    record = json.loads((folder / "training.json").read_text())
    config = config_of(num_steps=12, rows_per_step=2)
    assert record["recipe"] == config.what_is_learned()
    assert [row["step"] for row in record["log"]] == [0, 11]
    assert set(record["held_out_pass@1"]) == set(pico_families())
    card = (folder / "README.md").read_text()
    for line in (
        "| command | `make pico-teacher` |",
        "| seed | 17 |",
        "| steps | 12 of 2 rows of 256 tokens |",
        "| tokens | 6,144 (padding included) |",
        f"| seconds | {record['log'][-1]['seconds']:.0f} of training on one {record['hardware']}",
        f"| last loss | {record['log'][-1]['loss']:.4f}, MTP {record['log'][-1]['mtp_loss']:.4f} |",
    ):
        assert line in card
    assert all(f"| {family} |" in card for family in pico_families())


def test_the_recipe_of_the_repository_is_read_with_overrides() -> None:
    config = load_pretrain_config(overrides=["num_steps=5"])
    assert config.num_steps == 5
    assert config.architecture["kv_lora_rank"] == 512
