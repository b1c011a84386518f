"""The models that lie in the repository are what their cards, configs and recipes say, and the teacher can teach."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.problems import load_problems
from distill.problems.stream import PICO_FAMILIES, pico_families, stream
from distill.problems.worked import worked_solution
from distill.recipe import NativeTeacher, ReasoningGymSource, VerifyConfig
from distill.records import Sampling, TraceRequest
from distill.verify import open_verifier
from students.pretrain.bases import load_bases_config
from students.zoo import list_students
from teacher.backends import open_teacher
from teacher.model.checkpoint import load_checkpoint
from teacher.model.config import DeepseekV3Config, read_config
from teacher.model.counts import count_parameters
from teacher.train.make import load_pretrain_config
from tests.repository import REPOSITORY

TEACHER = REPOSITORY / "teacher" / "pico"
BASES = {name: REPOSITORY / "students" / "pico" / name for name in load_bases_config().bases}
FOLDERS = {"teacher": TEACHER, **BASES}
THINKING = ("<think>", "</think>")


@cache
def pico_texts() -> list[str]:
    return [
        text
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=71, split="held_out"), 20)
        for text in (problem.prompt, worked_solution(problem), f"\\boxed{{{problem.answer}}}")
    ]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_has_every_part_of_v3() -> None:
    config = read_config(TEACHER)
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)  # all that vLLM's CPU kernel takes
    assert config.q_lora_rank is not None
    assert config.n_group > config.topk_group > 1
    assert config.first_k_dense_replace == 1
    assert config.n_shared_experts == 1
    assert config.num_nextn_predict_layers == 1
    assert config.n_routed_experts > config.num_experts_per_tok
    for size in (config.hidden_size, config.intermediate_size, config.moe_intermediate_size):
        assert size % 128 == 0
    tree = read_json(TEACHER / "config.json")
    assert (tree["topk_method"], tree["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert tree["quantization_config"]["weight_block_size"] == [128, 128]


def test_the_teacher_is_stored_as_fp8_blocks() -> None:
    with safe_open(TEACHER / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        kinds = {name: part.get_dtype() for name, part in stored.items()}
        shapes = {name: part.get_shape() for name, part in stored.items()}
    quantised = [name for name, kind in kinds.items() if kind == "F8_E4M3"]
    assert {name for name in kinds if name.endswith("_scale_inv")} == {name + "_scale_inv" for name in quantised}
    for name in quantised:
        assert kinds[name + "_scale_inv"] == "F32"
        assert shapes[name + "_scale_inv"] == [-(-size // 128) for size in shapes[name]], name
    for part in ("self_attn.q_a_proj", "self_attn.kv_b_proj", ".experts.15.down_proj", "shared_experts.up_proj"):
        assert any(part in name for name in quantised), part
    size_bytes = sum(path.stat().st_size for path in TEACHER.iterdir())
    assert size_bytes < 20_000_000


def test_the_teachers_size_is_what_its_card_says() -> None:
    counts = count_parameters(read_config(TEACHER))
    assert 4e6 <= counts.active < counts.total <= 20e6
    assert f"{counts.total / 1e6:.1f}M parameters ({counts.active / 1e6:.1f}M active a token)" in card(TEACHER)
    assert f"an MTP module of {counts.mtp_total / 1e6:.1f}M" in card(TEACHER)
    model = load_checkpoint(TEACHER)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(counts.total + counts.mtp_total, rel=1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert any(router.e_score_correction_bias.abs().max() > 0.01 for router in model.routers())  # balanced by it


def test_the_teacher_was_made_by_the_recipe_of_the_repository() -> None:
    recipe, record = load_pretrain_config(), read_json(TEACHER / "training.json")
    assert record["recipe"] == recipe.what_is_learned()
    shipped = read_config(TEACHER).model_dump()
    wanted = DeepseekV3Config.model_validate({"vocab_size": recipe.vocab_size, **recipe.architecture}).model_dump()
    differing = {name for name in wanted if wanted[name] != shipped[name]}
    assert differing == {"bos_token_id", "eos_token_id", "pad_token_id"}
    first, last = record["log"][0], record["log"][-1]
    assert last["step"] == recipe.num_steps - 1
    assert last["loss"] < 0.1 * first["loss"]
    assert last["max_load"] < 1.2 < first["max_load"]


def test_the_teachers_card_says_how_it_was_made() -> None:
    record = read_json(TEACHER / "training.json")
    recipe, last = record["recipe"], record["log"][-1]
    tokens = recipe["num_steps"] * recipe["rows_per_step"] * recipe["row_length"]
    accuracy = record["held_out_pass@1"]
    for line in (
        "| command | `make pico-teacher` |",
        f"| seed | {recipe['seed']} |",
        f"| steps | {recipe['num_steps']:,} of {recipe['rows_per_step']} rows of {recipe['row_length']} tokens |",
        f"| tokens | {tokens:,} (padding included) |",
        f"| seconds | {last['seconds']:.0f} of training on one {record['hardware']}, ",
        f"| maximal expert load | {last['max_load']:.2f} of the mean",
        f"| data | {recipe['num_problems']:,} problems with worked solutions",
        f"| held-out pass@1 | {100 * sum(accuracy.values()) / len(accuracy):.1f}% at temperature 0.6",
        *(f"| {family} | {100 * accuracy[family]:.1f}% |" for family in pico_families()),
    ):
        assert line in card(TEACHER)


@pytest.mark.slow
def test_the_teacher_is_right_on_held_out_problems() -> None:
    source = ReasoningGymSource(families=str(PICO_FAMILIES), count=64, seed=20_231, split="held_out")
    problems = load_problems([source], base_dir=REPOSITORY)
    assert {problem.source for problem in problems} == set(pico_families())
    teacher = open_teacher(NativeTeacher(model="teacher/pico", batch_size=64), base_dir=REPOSITORY)
    requests = [TraceRequest(problem=problem, sample_index=0) for problem in problems]
    done = list(teacher.generate(requests, Sampling(temperature=0.6, max_tokens=256, seed=5)))
    teacher.close()
    assert all(re.match(r"<think>\n.+</think>", completion.text, re.DOTALL) for completion in done)
    with open_verifier(VerifyConfig(num_workers=1)) as verifier:
        verdicts = list(verifier.verify([(c.request.problem, c.text, c.finish_reason) for c in done]))
    wrong = [(c.request.problem.prompt, c.text) for c, v in zip(done, verdicts, strict=True) if v.state != "correct"]
    assert len(problems) == len(done) == 64
    assert len(wrong) <= 6, wrong  # 90%


# --- the bases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_what_its_card_and_the_zoo_say(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASES[name])
    record = read_json(BASES[name] / "pretrain.json")
    count = model.num_parameters()
    assert 0.2e6 <= count <= 1e6
    assert count == record["num_parameters"]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    shape = load_bases_config().bases[name]
    assert model.config.model_type == shape.architecture
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for field in fields:
        assert getattr(model.config, field) == getattr(shape, field)
    (student,) = [student for student in list_students() if student.name == name]
    assert (REPOSITORY / student.base).resolve() == BASES[name].resolve()
    assert student.num_parameters == pytest.approx(count, rel=0.05)
    recipe = record["recipe"]
    assert recipe == load_bases_config().model_dump(mode="json")
    row_length = recipe["corpus"]["row_length"]
    for line in (
        f"{count:,} parameters",
        "| command | `make pico-bases` |",
        f"| seed | {recipe['seed']} |",
        f"| steps | {recipe['num_steps']:,} of {recipe['rows_per_step']} rows of {row_length} tokens |",
        f"| tokens | {record['tokens']:,} (padding included) |",
        f"| seconds | {record['seconds']:.0f} on one {record['hardware']}, ",
        f"| last loss | {record['log'][-1]['loss']:.4f} |",
    ):
        assert line in card(BASES[name])
    assert record["tokens"] == recipe["num_steps"] * recipe["rows_per_step"] * row_length
    assert record["log"][-1]["loss"] < 0.2 * record["log"][0]["loss"]


@pytest.mark.parametrize("name", BASES)
def test_a_base_speaks_plain_chatml(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASES[name])
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False)
        == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert (
        tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (tokenizer.eos_token, None)


# --- the tokenizers ---------------------------------------------------------------------------------------------------


def test_bases_share_a_tokenizer_that_is_not_the_teachers() -> None:
    of_bases = {(folder / "tokenizer.json").read_bytes() for folder in BASES.values()}
    assert len(of_bases) == 1
    teacher, base = (Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json")) for name in ("teacher", "qwen2-0.2m"))
    assert teacher.get_vocab() != base.get_vocab()
    assert any(teacher.encode(text).ids != base.encode(text).ids for text in pico_texts())


@pytest.mark.parametrize("name", FOLDERS)
def test_every_reader_splits_pico_text_alike(name: str) -> None:
    stored = Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(FOLDERS[name])
    for text in pico_texts():
        ids = stored.encode(text).ids
        assert auto.encode(text, add_special_tokens=False) == ids, text
        assert auto.decode(ids, skip_special_tokens=False) == text
        assert auto.decode(ids, skip_special_tokens=True) == text  # <think> is no special token: it stays


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_reasoning_and_digits_stand_alone(name: str) -> None:
    stored = Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json"))
    assert [len(stored.encode(token).ids) for token in THINKING] == [1, 1]
    assert len(stored.encode("12 + 345").ids) == 6
    vocab_size = read_json(FOLDERS[name] / "config.json")["vocab_size"]
    assert stored.get_vocab_size() <= vocab_size


def test_the_teachers_template_opens_the_reasoning() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|><|user|>2 + 2?<|assistant|><think>\n"
